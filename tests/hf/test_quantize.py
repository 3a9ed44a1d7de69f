"""quantize(method="rtn"): a dense folder in, an AWQ checkpoint out, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from awq_core import CheckpointError, ConfigError
from awq_core.hf import quantize as module
from awq_core.layouts import checkpoint_layout
from awq_core.quantization import write
from awq_core.quantization.rtn import quantize_weight
from awq_core.testing.tiny import tiny_model

NAME = "model.layers.0.mlp.down_proj"
quantize = partial(module.quantize, method="rtn")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dense model with side files; don't change it."""
    folder = tiny_model(tmp_path_factory.mktemp("dense"), "llama_bias")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("kept")
    return folder


@pytest.fixture
def spoil(source, tmp_path):
    """``spoil(change)``: a copy of the dense model whose tensors ``change`` has edited in place."""

    def make(change):
        folder = shutil.copytree(source, tmp_path / "dense")
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast"])
def test_the_checkpoint(source, tmp_path, layout):
    report = quantize(source, tmp_path / "out", group_size=32, layout=layout)
    dense, found = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    linears = [key for key in dense if key.endswith("_proj.weight")]
    assert (report.quantized, report.dense) == (len(linears), len(dense) - len(linears)) == (14, 21)
    assert report.skipped == (("lm_head", "output embedding"),)
    assert report.bytes_before == sum(tensor.nbytes for tensor in dense.values())
    assert report.bytes_after == sum(tensor.nbytes for tensor in found.values())
    for key, tensor in dense.items():
        if key in linears:
            name = key.removesuffix(".weight")
            for suffix, wanted in checkpoint_layout(layout).pack(quantize_weight(tensor, 32)).items():
                assert torch.equal(found.pop(f"{name}.{suffix}"), wanted)
        else:
            assert torch.equal(found.pop(key), tensor)
    assert not found
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    said = config["quantization_config"]
    assert {k: said[k] for k in ("quant_method", "bits", "group_size", "zero_point", "version")} == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": layout,
    }
    assert said["modules_to_not_convert"] is None
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_counts_every_tensor(source, tmp_path):
    seen = []
    quantize(source, tmp_path / "out", group_size=32, progress=lambda *step: seen.append(step))
    assert [done for done, _, _ in seen] == list(range(1, 36))
    assert {total for _, total, _ in seen} == {35}
    assert len({name for _, _, name in seen}) == 35


def test_bfloat16(source, tmp_path):
    quantize(source, tmp_path / "out", group_size=32, dtype="bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for name, t in found.items() if name.endswith(("norm.weight", "bias"))} == {"torch.bfloat16"}
    assert found[f"{NAME}.scales"].dtype == torch.float16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_modules_to_not_convert(source, tmp_path, load):
    report = quantize(source, tmp_path / "out", group_size=32, modules_to_not_convert=["k_proj"])
    left = [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert report.skipped == (("lm_head", "output embedding"), *((name, "asked for") for name in left))
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == left
    assert type(load(tmp_path / "out").model.layers[0].self_attn.k_proj) is nn.Linear


def test_shards(source, tmp_path):
    quantize(source, tmp_path / "out", group_size=32, max_shard_size=20_000)
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_a_sharded_source_and_a_pytorch_source(source, tmp_path):
    quantize(source, tmp_path / "wanted", group_size=32)
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(stored, tmp_path / "bin" / "pytorch_model.bin")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for name in ("bin", "shards"):
        quantize(tmp_path / name, tmp_path / f"{name}-out", group_size=32)
        found = load_file(tmp_path / f"{name}-out" / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert not list((tmp_path / f"{name}-out").glob("*.bin"))


def test_a_linear_that_cannot_be_packed_stays_dense_and_is_listed(tmp_path, load, ids):
    """Qwen2-MoE has a gate of one output beside its experts."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    report = quantize(tmp_path / "dense", tmp_path / "out", group_size=32)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert (gate, "its 1 outputs do not fill words of 8 codes") in report.skipped
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["modules_to_not_convert"] == ["model.layers.0.mlp.gate", gate]
    assert ("model.layers.0.mlp.gate", "router of the experts") in report.skipped
    assert load(tmp_path / "out")(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layout": "marlin"}, "layout 'marlin' cannot be written: choose gemm, gemv, gemv_fast"),
        ({"dtype": "float32"}, "dtype 'float32' cannot be written: choose float16 or bfloat16"),
        ({"layout": "gemv", "zero_point": False}, "zero_point=False needs layout gemm"),
        ({"group_size": 128}, "group_size 128 does not fit linears of 64 inputs in layout gemm; take --group-size 64"),
        ({"group_size": 48}, "group_size 48 does not fit linears of 64, 128 inputs .*; take --group-size 64"),
        ({"method": "gptq"}, "method 'gptq' does not exist: choose awq or rtn"),
        ({"clip": False}, "method rtn has no option 'clip'"),
        ({"export_dense": True}, "it needs method awq"),
        ({"group_size": 16, "layout": "gemv"}, "group_size 16 does not fit .* layout gemv; take --group-size 64"),
    ],
)
def test_wrong_options_are_one_sentence(source, tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        quantize(source, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"modules_to_not_convert": ["experts.1.up_proj"]}, {"layout": "gemv_fast"}])
def test_experts_are_quantized_all_or_none(tmp_path, load, ids, options):
    """They are stacked when they are loaded. gemv_fast takes groups of 64, which the 32 inputs of down_proj are not."""
    tiny_model(tmp_path / "dense", "qwen3_moe", hidden_size=128, head_dim=32, moe_intermediate_size=32)
    group_size = 64 if "layout" in options else 32
    report = quantize(tmp_path / "dense", tmp_path / "out", group_size=group_size, **options)
    reasons = {name: why for name, why in report.skipped if ".experts." in name}
    assert len(reasons) == 24
    assert "other experts stay dense" in reasons.values()
    assert report.quantized == 8
    assert load(tmp_path / "out")(ids).logits.isfinite().all()


def test_a_minority_that_the_group_size_does_not_fit_stays_dense_and_is_listed(tmp_path, load, ids):
    tiny_model(tmp_path / "dense", intermediate_size=80)
    report = quantize(tmp_path / "dense", tmp_path / "out", group_size=32)
    left = [(f"model.layers.{i}.mlp.down_proj", "group size 32 does not fit its 80 inputs") for i in (0, 1)]
    assert [entry for entry in report.skipped if entry[1] != "output embedding"] == left
    assert type(load(tmp_path / "out").model.layers[0].mlp.down_proj) is nn.Linear


@pytest.mark.parametrize(("hidden", "wanted"), [(64, 64), (128, 128), (96, 32), (48, 16)])
def test_without_a_group_size_the_largest_that_fits_all(tmp_path, hidden, wanted):
    tiny_model(tmp_path / "dense", hidden_size=hidden, intermediate_size=256, num_attention_heads=4)
    report = quantize(tmp_path / "dense", tmp_path / "out")
    assert report.group_size == wanted
    assert len(report.notes) == (wanted != 128)


def test_advice_that_fits_every_linear(tmp_path):
    tiny_model(tmp_path / "dense", hidden_size=48, intermediate_size=64, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="linears of 48 inputs in layout gemm; take --group-size 16"):
        quantize(tmp_path / "dense", tmp_path / "out", group_size=32)
    with pytest.raises(ConfigError, match="layout gemv; leave these linears out with --skip"):
        quantize(tmp_path / "dense", tmp_path / "out", group_size=32, layout="gemv")
    quantize(tmp_path / "dense", tmp_path / "out", group_size=16)


def test_a_quantized_model_is_refused(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="is quantized already: quantize the dense model"):
        quantize(checkpoint(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", [f"{NAME}.weight", "model.norm.weight"])
def test_nan_is_refused_and_named(spoil, tmp_path, key):
    def change(stored):
        stored[key].view(-1)[3] = float("nan")

    with pytest.raises(CheckpointError, match=rf"{key.removesuffix('.weight')}.*NaN or inf"):
        quantize(spoil(change), tmp_path / "out", group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_values_beyond_float16(spoil, tmp_path):
    def change(stored):
        stored["model.norm.weight"] = torch.full((64,), 1e5)

    folder = spoil(change)
    with pytest.raises(CheckpointError, match="beyond float16's range: quantize with --dtype bfloat16"):
        quantize(folder, tmp_path / "out", group_size=32)
    quantize(folder, tmp_path / "out", group_size=32, dtype="bfloat16")


def test_an_existing_folder_is_not_touched(source, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already: choose another folder"):
        quantize(source, tmp_path, group_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    quantize(source, tmp_path / "new", group_size=32)
    quantize(source, tmp_path / "new", group_size=64, overwrite=True)
    said = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert said["group_size"] == 64


def test_the_model_itself_is_never_replaced(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "parent" / "dense")
    for out in (folder, tmp_path / "parent", folder.parent / ".." / "parent" / "dense"):
        with pytest.raises(CheckpointError, match="is or holds the model"):
            quantize(folder, out, group_size=32, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in source.iterdir())


def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def save_file(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "save_file", save_file)
    with pytest.raises(CheckpointError, match="was not written: the disk is full; nothing is left of the attempt"):
        quantize(source, tmp_path / "out", group_size=32)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_the_old_checkpoint(source, tmp_path):
    quantize(source, tmp_path / "out", group_size=32)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def interrupt(done, total, name):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", group_size=64, overwrite=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "model", "sentence"),
    [
        ("BertConfig", "BertModel", "is a bert model, an encoder that reads in both directions: only decoder-only"),
        ("T5Config", "T5ForConditionalGeneration", "is a t5 model, which has an encoder too: only decoder-only"),
        ("ViTConfig", "ViTModel", "is a vit model, and transformers has no causal language model of that kind"),
    ],
)
def test_a_model_that_is_no_decoder(tmp_path, config, model, sentence):
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "d_ff": 128, "num_layers": 1}
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    made.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=sentence) as error:
        quantize(tmp_path / "other", tmp_path / "out", group_size=32)
    assert "\n" not in str(error.value)


def test_a_model_that_transformers_does_not_know(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "hyperllama"}))
    with pytest.raises(CheckpointError, match=r"config\.json that transformers can load: .*hyperllama") as error:
        quantize(folder, tmp_path / "out", group_size=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", ["nothing", "empty", "config only"])
def test_a_source_that_is_no_model(source, tmp_path, make):
    folder = tmp_path / "in"
    if make != "nothing":
        folder.mkdir()
    if make == "config only":
        shutil.copy(source / "config.json", folder)
    with pytest.raises(CheckpointError, match=r"no such folder|is empty|is the download complete") as error:
        quantize(folder, tmp_path / "out", group_size=32)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
