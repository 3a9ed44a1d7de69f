"""AutoAWQ's class: the script of its README on a tiny model, and what becomes of each option."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from awq_core import AutoAWQForCausalLM, CheckpointError, ConfigError
from awq_core.hf.autoawq_options import calibration
from awq_core.linear import AwqLinear

TEXT = "how to make a cake of flour and eggs"
CALIBRATION = {"calib_data": [TEXT] * 40, "max_calib_samples": 4, "max_calib_seq_len": 32}
QUANT_CONFIG = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.fixture(scope="module")
def dense_folder(checkpoint):
    """The dense model that the tiny checkpoint was made from."""
    return checkpoint().parent / "dense"


@pytest.fixture(scope="module")
def tokenizer():
    """One that is not beside the model."""
    words = {word: i for i, word in enumerate(["[UNK]", *TEXT.split(), *map(str, range(100))])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


@pytest.fixture(scope="module")
def quantized(dense_folder, tokenizer):
    model = AutoAWQForCausalLM.from_pretrained(dense_folder)
    model.quantize(tokenizer, quant_config=QUANT_CONFIG, **CALIBRATION)
    return model


def linears(model) -> list[AwqLinear]:
    return [module for module in model.model.modules() if isinstance(module, AwqLinear)]


def test_the_script_of_autoawqs_readme(dense_folder, tokenizer, checkpoint, tensors, tmp_path, ids, assert_close):
    before = sorted(file.name for file in dense_folder.iterdir())
    model = AutoAWQForCausalLM.from_pretrained(str(dense_folder), low_cpu_mem_usage=True, use_cache=False)
    assert not model.is_quantized
    assert linears(model) == []
    reference = model(ids).logits
    model.quantize(tokenizer, quant_config=QUANT_CONFIG, **CALIBRATION)
    assert model.is_quantized
    assert len(linears(model)) == 14
    out = tmp_path / "out"
    model.save_quantized(str(out))
    assert torch.nn.functional.cosine_similarity(model(ids).logits.flatten(), reference.flatten(), dim=0) > 0.9

    assert tensors(out).keys() == tensors(checkpoint()).keys()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["version"]) == (4, 32, "gemm")
    assert (config["meta"]["method"], config["meta"]["calibration"]["samples"]) == ("AWQ", 4)
    assert AutoTokenizer.from_pretrained(out)("make a cake").input_ids == [3, 4, 5]
    assert sorted(file.name for file in dense_folder.iterdir()) == before

    again = AutoAWQForCausalLM.from_quantized(out, fuse_layers=False, max_seq_len=64, batch_size=1)
    assert again.is_quantized
    assert again.quant_config["group_size"] == 32
    assert_close(again(ids).logits, model(ids).logits)
    answer = again.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (2, 10)
    assert answer.is_inference()


def test_saving_what_was_loaded_keeps_the_bytes(checkpoint, tensors, tmp_path):
    model = AutoAWQForCausalLM.from_quantized(
        checkpoint(), "model.safetensors", fuse_layers=False, torch_dtype=torch.float16
    )
    model.save_quantized(tmp_path / "out")
    stored, same = tensors(tmp_path / "out"), tensors(checkpoint())
    assert stored.keys() == same.keys()
    assert all(stored[name].equal(same[name]) for name in same)


def test_fused_layers_give_the_same_answers_and_bytes(checkpoint, tensors, tmp_path, ids, assert_close):
    options = {"torch_dtype": torch.float16}
    fused = AutoAWQForCausalLM.from_quantized(checkpoint(), fuse_layers=True, max_seq_len=16, **options)
    plain = AutoAWQForCausalLM.from_quantized(checkpoint(), fuse_layers=False, **options)
    assert fused.model.awq_fused.joined == 10  # two layers of q, k, v and gate, up
    assert_close(fused(ids).logits, plain(ids).logits)
    with pytest.raises(ConfigError, match="more than fuse_max_seq_len=16"):
        fused.generate(ids, max_new_tokens=10)
    fused.save_quantized(tmp_path / "out")
    stored, same = tensors(tmp_path / "out"), tensors(checkpoint())
    assert stored.keys() == same.keys()
    assert all(stored[name].equal(same[name]) for name in same)


def test_an_architecture_without_a_mapping_runs_unfused(checkpoint, monkeypatch, told, ids):
    monkeypatch.setattr("awq_fusers.apply.known_mappings", dict)
    model = AutoAWQForCausalLM.from_quantized(checkpoint("falcon"))
    assert model(ids).logits.isfinite().all()
    assert any("runs unfused" in sentence and "has no fusing mapping" in sentence for sentence in told())


def test_shards_beside_a_tokenizer_that_was_saved_first(quantized, tmp_path, tensors, checkpoint):
    (tmp_path / "tokenizer.json").write_text("mine")
    quantized.save_quantized(tmp_path, shard_size="20KB")
    files = sorted(file.name for file in tmp_path.iterdir())
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    assert tensors(tmp_path).keys() == tensors(checkpoint()).keys()
    assert not [file for file in tmp_path.parent.iterdir() if file.name.startswith(f".{tmp_path.name}")]
    with pytest.raises(CheckpointError, match=r"holds weights already .*: choose another folder"):
        quantized.save_quantized(tmp_path)


def test_options_of_the_search(dense_folder, tokenizer, told, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 80)
    model = AutoAWQForCausalLM.from_pretrained(dense_folder)
    options = CALIBRATION | {"calib_data": tmp_path / "text.txt", "split": "train", "max_chunk_memory": 1024}
    model.quantize(tokenizer, {"version": "GEMV"}, duo_scaling=False, apply_clip=False, **options)
    used = model.quant_config["meta"]["options"]
    assert (used["duo_scaling"], used["clip"], model.quant_config["group_size"]) == (False, False, 64)
    assert {linear.spec.layout for linear in linears(model)} == {"gemv"}
    assert [sentence for sentence in told() if "split has no effect" in sentence]
    assert [sentence for sentence in told() if "max_chunk_memory has no effect" in sentence]
    assert [sentence for sentence in told() if "group size 64, since 128 does not divide" in sentence]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"calib_data": "wikitext"}, "is no file or folder here: data sets of the hub are not downloaded"),
        ({"calib_data": [[1, 2], [3]]}, "lists of tokens are not taken"),
        ({"n_samples": 3}, "there is no option 'n_samples'"),
        ({"export_compatible": True}, "export_compatible=True is not supported"),
        ({"calib_data": ["too short"]}, "give more text"),
    ],
)
def test_options_of_the_search_that_cannot_be_served(dense_folder, tokenizer, options, why):
    model = AutoAWQForCausalLM.from_pretrained(dense_folder)
    with pytest.raises(ConfigError, match=why):
        model.quantize(tokenizer, QUANT_CONFIG, **options)


def test_pileval_is_the_text_that_travels(told, tmp_path):
    assert calibration("pileval", tmp_path) is None
    assert [sentence for sentence in told() if "calib_data='pileval' is not downloaded" in sentence]


def test_a_disk_that_fills_leaves_the_folder_as_it_was(quantized, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("awq_core.quantization.write.save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        quantized.save_quantized(tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "tokenizer.json"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"w_bit": 3}, "bits is 3, but awq-core runs 4-bit"),
        ({"q_group_size": 20}, "group_size is 20"),
        ({"group_size": 64, "q_group_size": 32}, "keep the one that is right"),
        ({"version": "exl2"}, "layout 'exl2' cannot be written"),
        ({"sym": True}, "quant_config: there is no option 'sym'"),
    ],
)
def test_a_quant_config_that_cannot_be_served(dense_folder, config, why):
    model = AutoAWQForCausalLM.from_pretrained(dense_folder)
    with pytest.raises(ConfigError, match=why):
        model.quantize(quant_config=config)
    assert not model.is_quantized


@pytest.mark.parametrize(
    ("options", "told_of"),
    [
        ({"batch_size": 8}, "batch_size has no effect: the cache grows"),
        ({"safetensors": False}, "safetensors=False has no effect"),
        ({"low_cpu_mem_usage": True}, "low_cpu_mem_usage has no effect"),
    ],
)
def test_options_without_a_meaning_are_told(checkpoint, told, options, told_of):
    AutoAWQForCausalLM.from_quantized(checkpoint(), fuse_layers=False, **options)
    assert [sentence for sentence in told() if told_of in sentence]


def test_ipex_is_the_cpu_backend(checkpoint):
    model = AutoAWQForCausalLM.from_quantized(checkpoint(), fuse_layers=False, use_ipex=True)
    chosen = {plan.decision.chosen.backend for linear in linears(model) for plan in linear.plans.values()}
    assert chosen == {"cpu"}


def test_two_kernels_at_once(checkpoint):
    with pytest.raises(ConfigError, match="asks for exllama and cpu at once: choose one"):
        AutoAWQForCausalLM.from_quantized(checkpoint(), use_exllama_v2=True, use_ipex=True)


def test_a_named_file(checkpoint, tmp_path, ids):
    folder = shutil.copytree(checkpoint(), tmp_path / "renamed")
    (folder / "model.safetensors").rename(folder / "awq.safetensors")
    model = AutoAWQForCausalLM.from_quantized(folder, "awq.safetensors", fuse_layers=False)
    assert model(ids).logits.isfinite().all()
    model.save_quantized(tmp_path / "out")
    assert "awq.safetensors" not in (tmp_path / "out" / "config.json").read_text()
    with pytest.raises(ConfigError, match="is not a safetensors file: leave it out"):
        AutoAWQForCausalLM.from_quantized(folder, "awq.pt")


@pytest.mark.parametrize("size", ["5 apples", "", "0GB", "-1"])
def test_a_shard_size_that_is_none(quantized, tmp_path, size):
    with pytest.raises(ConfigError, match="it must be a number of bytes or a size such as"):
        quantized.save_quantized(tmp_path / "out", shard_size=size)


def test_refusals(dense_folder, checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="made by its from_pretrained"):
        AutoAWQForCausalLM()
    with pytest.raises(CheckpointError, match="is quantized already: open it with"):
        AutoAWQForCausalLM.from_pretrained(checkpoint())
    with pytest.raises(CheckpointError, match="no such folder"):
        AutoAWQForCausalLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is no folder here, and was not found on the hub"):
        AutoAWQForCausalLM.from_pretrained("nobody/nothing")
    model = AutoAWQForCausalLM.from_pretrained(dense_folder)
    with pytest.raises(CheckpointError, match=r"is not quantized yet: call quantize\(\)"):
        model.save_quantized(tmp_path / "out")
    loaded = AutoAWQForCausalLM.from_quantized(checkpoint(), fuse_layers=False)
    with pytest.raises(CheckpointError, match="is quantized already: quantize the dense model"):
        loaded.quantize(quant_config=QUANT_CONFIG)
    with pytest.raises(ConfigError, match="only safetensors are written"):
        loaded.save_quantized(tmp_path / "out", safetensors=False)


def test_temporary_files_go_with_the_model(dense_folder, tokenizer):
    model = AutoAWQForCausalLM.from_pretrained(dense_folder)
    model.quantize(tokenizer, QUANT_CONFIG, **CALIBRATION)
    made = Path(model.model_path)
    assert (made / "model.safetensors").is_file()
    del model
    gc.collect()
    assert not made.parent.exists()
