"""quantize(method="awq"): blocks of every kind are understood by running them, and what is saved is what was found."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from awq_core import CheckpointError, ConfigError
from awq_core.hf import search as search_module
from awq_core.hf.decoder import Decoder
from awq_core.hf.quantize import quantize
from awq_core.quantization.fold import Activation, Norm, Rows, fold
from awq_core.quantization.state import finished
from awq_core.quantization.trace import trace
from awq_core.quantization.unstack import unstack
from awq_core.testing.tiny import EXPERTS, SMALL, tiny_model

CHARACTERS = [chr(code) for code in range(32, 126)] + ["\n"]
BASE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = SMALL | EXPERTS
QKV, GATE_UP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"
IN, POST = "norm input_layernorm", "norm post_attention_layernorm"
LLAMA = {QKV: IN, "self_attn.o_proj": "rows self_attn.v_proj", GATE_UP: POST, "mlp.down_proj": "rows mlp.up_proj"}

# Config class, sizes, and the groups of the first block: linears, and what comes before them.
ARCHITECTURES = {
    "llama": ("LlamaConfig", SMALL, LLAMA),
    "llama_bias": ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}, LLAMA),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 16}, LLAMA),
    "qwen2": ("Qwen2Config", SMALL, LLAMA),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 16}, LLAMA),
    "gemma": ("GemmaConfig", SMALL | {"head_dim": 16}, LLAMA),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 16}, LLAMA | {GATE_UP: "norm pre_feedforward_layernorm"}),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL | {"head_dim": 16, "sliding_window": 16},
        LLAMA | {GATE_UP: "norm pre_feedforward_layernorm"},
    ),
    "phi3": (
        "Phi3Config",
        SMALL | {"pad_token_id": 0, "eos_token_id": 1},
        {
            "self_attn.qkv_proj": IN,
            "self_attn.o_proj": "rows self_attn.qkv_proj",
            "mlp.gate_up_proj": POST,
            "mlp.down_proj": "rows mlp.gate_up_proj",
        },
    ),
    "opt": (
        "OPTConfig",
        BASE | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
        {
            QKV: "norm self_attn_layer_norm",
            "self_attn.out_proj": "rows self_attn.v_proj",
            "fc1": "norm final_layer_norm",
            "fc2": "rows fc1",
        },
    ),
    "opt_post_norm": (
        "OPTConfig",
        BASE
        | {
            "ffn_dim": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 256,
            "do_layer_norm_before": False,
        },
        {QKV: "none", "self_attn.out_proj": "rows self_attn.v_proj", "fc1": "none", "fc2": "rows fc1"},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        BASE | {"intermediate_size": 128},
        {
            "attention.query_key_value": IN,
            "attention.dense": "rows attention.query_key_value",
            "mlp.dense_h_to_4h": POST,
            "mlp.dense_4h_to_h": "activation mlp.act",
        },
    ),
    "falcon": (
        "FalconConfig",
        BASE,
        {
            "self_attention.query_key_value mlp.dense_h_to_4h": IN,
            "self_attention.dense": "rows self_attention.query_key_value",
            "mlp.dense_4h_to_h": "activation mlp.act",
        },
    ),
    "falcon_new": (
        "FalconConfig",
        BASE | {"new_decoder_architecture": True, "num_kv_heads": 2},
        {
            "self_attention.query_key_value": "norm ln_attn",
            "self_attention.dense": "rows self_attention.query_key_value",
            "mlp.dense_h_to_4h": "norm ln_mlp",
            "mlp.dense_4h_to_h": "activation mlp.act",
        },
    ),
    "mixtral": (
        "MixtralConfig",
        SMALL | {"num_local_experts": 2},
        {
            QKV: IN,
            "self_attn.o_proj": "rows self_attn.v_proj",
            " ".join(f"mlp.experts.{e}.{part}_proj" for e in (0, 1) for part in ("gate", "up")): POST,
            "mlp.experts.0.down_proj": "rows mlp.experts.0.up_proj",
            "mlp.experts.1.down_proj": "rows mlp.experts.1.up_proj",
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        MOE | {"head_dim": 16, "num_experts": 2, "decoder_sparse_step": 1, "mlp_only_layers": []},
        {
            QKV: IN,
            "self_attn.o_proj": "rows self_attn.v_proj",
            " ".join(f"mlp.experts.{e}.{part}_proj" for e in (0, 1) for part in ("gate", "up")): POST,
            "mlp.experts.0.down_proj": "rows mlp.experts.0.up_proj",
            "mlp.experts.1.down_proj": "rows mlp.experts.1.up_proj",
        },
    ),
    "olmo2": (  # norms after the sublayers: nothing to fold into but v and up
        "Olmo2Config",
        SMALL | {"pad_token_id": 0, "eos_token_id": 1},
        LLAMA | {QKV: "none", GATE_UP: "none"},
    ),
}


def tokenizer_into(folder):
    """A tokenizer of single characters."""
    vocabulary = {letter: i for i, letter in enumerate(CHARACTERS)} | {"[UNK]": len(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)


def noisy(model):
    """Norms that are not one, biases that are not zero, and weights large enough to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * 0.3)
            elif "embed" not in name:
                tensor.mul_(4)
    return model


def dense_model(name, **overrides):
    config, sizes, _ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**(sizes | overrides)))
    return noisy(made.float().eval())


def dense_folder(folder, name="llama", **overrides):
    model = dense_model(name, **overrides).half()
    model.save_pretrained(folder)
    tokenizer_into(folder)
    return folder


QUICK = {"group_size": 32, "calib_samples": 4, "calib_length": 48}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture
def spoil(source, tmp_path):
    """``spoil(change)``: a copy of the model whose tensors ``change`` has edited in place."""

    def make(change):
        folder = shutil.copytree(source, tmp_path / "dense")
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def said(group):
    match group.before:
        case Norm(path):
            return f"norm {path}"
        case Rows(path):
            return f"rows {path}"
        case Activation(path):
            return f"activation {path}"
        case None:
            return "none"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scaling_alone_changes_nothing(name, ids):
    """Every group is found, with what comes before it; random scales folded in leave the logits as they were."""
    model = dense_model(name)
    with torch.no_grad():
        before = model(ids).logits
    decoder = Decoder.of(model)
    one, many = decoder.calls([ids.view(-1, 1)]), decoder.calls([ids])
    generator = torch.Generator().manual_seed(2)
    for number in range(len(decoder.blocks)):
        block = decoder.block(number)
        assert unstack(block) == []
        linears = [path for path, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
        traced = trace(block, one[number][0], many[number][0], linears, activations=True)
        assert sorted(path for group in traced.groups for path in group.linears) == sorted(linears)
        assert {" ".join(group.linears): said(group) for group in traced.groups} == ARCHITECTURES[name][2]
        for group in traced.groups:
            if group.before is not None:
                size = block.get_submodule(group.linears[0]).in_features
                fold(block, group, group.tie(torch.exp2(4 * torch.rand(size, generator=generator) - 2)))
        decoder.blocks[number] = block
    with torch.no_grad():
        after = model(ids).logits
    assert (after - before).norm() <= 1e-4 * before.norm()


def test_a_fold_that_does_not_hold_is_dropped_and_said(ids):
    decoder = Decoder.of(dense_model("opt_post_norm"))
    one, many = decoder.calls([ids.view(-1, 1)]), decoder.calls([ids])
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "fc1", "fc2"]
    traced = trace(decoder.block(0), one[0][0], many[0][0], linears)
    assert traced.dropped == ("fc1: scaling through self_attn_layer_norm changes the block",)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama_bias", {"layout": "gemv"}),
        ("qwen2", {"layout": "gemv_fast"}),
        ("gemma", {"group_size": -1}),
        ("phi3", {"zero_point": False}),
        ("opt", {"group_size": 16}),
        ("falcon", {}),
        ("mixtral", {}),
        ("qwen3_moe", {"propagate": True}),
        ("mixtral", {"group_size": 64}),  # all of the inputs of one projection of the experts, half of the other
        ("llama", {"tie_heads": True, "propagate": True, "correct": 0.5}),
        ("llama", {"feedback": False, "clip_qk": False}),
        ("llama", {"scale_steps": 0, "clip": False}),
    ],
    ids=str,
)
def test_what_is_saved_is_what_was_found(name, options, tmp_path, monkeypatch, load, ids):
    """The checkpoint, loaded, gives the logits of the model whose blocks were quantized in place."""
    blocks = []
    real = search_module.quantize_block

    def spy(block, *args, **kwargs):
        blocks.append(block)
        return real(block, *args, **kwargs)

    monkeypatch.setattr(search_module, "quantize_block", spy)
    folder = dense_folder(tmp_path / "dense", name)
    report = quantize(folder, tmp_path / "out", **(QUICK | options))
    assert report.quantized == sum(block_linears(block) for block in blocks)
    pseudo = load(folder, dtype=torch.float32)
    found = Decoder.of(pseudo)
    for number, block in enumerate(blocks):
        found.blocks[number] = block
    with torch.no_grad():
        wanted = pseudo(ids).logits
        got = load(tmp_path / "out", dtype=torch.float32)(ids).logits
    tolerance = 1e-2 if options.get("layout") == "gemv_fast" else 2e-3  # it stores its zeros times scales in float16
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def block_linears(block):
    return sum(isinstance(module, torch.nn.Linear) for module in block.modules())


def test_the_search_is_better_than_rounding(source, tmp_path, load, ids):
    def error(name, **options):
        quantize(source, tmp_path / name, **options)
        with torch.no_grad():
            return float((load(tmp_path / name, dtype=torch.float32)(ids).logits - dense).norm())

    with torch.no_grad():
        dense = load(source, dtype=torch.float32)(ids).logits
    # Four draws, since a model of random weights is not kind to any one: between 0.78 and 1.01 of rounding's error.
    found = [error(f"awq{seed}", **QUICK | {"calib_samples": 16, "seed": seed}) for seed in range(4)]
    assert sum(found) / len(found) < 0.95 * error("rtn", method="rtn", group_size=32)


def test_the_report_and_the_config_say_what_was_done(source, tmp_path):
    report = quantize(source, tmp_path / "out", **QUICK, seed=3)
    meta = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["meta"]
    assert meta["method"] == "AWQ"
    assert (meta["calibration"]["samples"], meta["calibration"]["length"]) == (4, 48)
    assert len(meta["calibration"]["sha256"]) == 64
    assert (meta["options"]["seed"], meta["options"]["group_size"]) == (3, 32)
    assert len(meta["losses"]) == 2
    assert all(0 < loss < 0.1 for loss in meta["losses"])
    stored = json.loads((tmp_path / "out" / "awq_report.json").read_text())
    assert stored["quantized"] == report.quantized == 14
    assert [block["block"] for block in stored["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(group["scaled"] <= group["nearest"] for block in stored["blocks"] for group in block["groups"][::3])
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(source, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        quantize(source, tmp_path / name, **QUICK, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("propagate", [False, True])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(source, tmp_path, propagate):
    options = QUICK | {"propagate": propagate}
    quantize(source, tmp_path / "whole", **options)

    def stop(done, total, name):
        if (done, total) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", **options, progress=stop)
    assert not (tmp_path / "out").exists()
    for other in ({"damping": 0.5}, {"group_size": 64}):
        with pytest.raises(
            CheckpointError, match=r"begun with another options; repeat those options, or leave --resume out"
        ):
            quantize(source, tmp_path / "out", **options | other, resume=True)
    steps = []
    quantize(source, tmp_path / "out", **options, resume=True, progress=lambda *step: steps.append(step))
    assert [step[0] for step in steps if step[1] == 2] == [2]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_goes_on_only_on_the_kind_of_device_that_it_was_begun_on(source, tmp_path, monkeypatch):
    def stop(done, total, name):
        if (done, total) == (1, 2):
            plan = next(tmp_path.glob(".out.awq-state/plan.json"))
            plan.write_text(plan.read_text().replace('"device": "cpu"', '"device": "cuda"'))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", **QUICK, progress=stop)
    with pytest.raises(CheckpointError, match="begun with another device"):
        quantize(source, tmp_path / "out", **QUICK, resume=True)


@pytest.mark.parametrize(("place", "kept"), [("state", 1), ("write", 2)])
def test_a_full_disk_keeps_the_blocks_that_are_finished(source, tmp_path, monkeypatch, place, kept):
    quantize(source, tmp_path / "whole", **QUICK)
    real = save_file

    def full(tensors, file, **options):
        if place == "write" or "block-00001" in file.name:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, file, **options)

    monkeypatch.setattr(f"awq_core.quantization.{place}.save_file", full)
    with pytest.raises(CheckpointError, match=r"the disk is full; .* kept.*, and the same command with --resume goes"):
        quantize(source, tmp_path / "out", **QUICK)
    assert finished(tmp_path / "out") == kept
    assert not list(tmp_path.glob("**/*.partial"))
    monkeypatch.undo()
    quantize(source, tmp_path / "out", **QUICK, resume=True)
    whole, found = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert found.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_device_without_memory_is_one_sentence(source, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(search_module, "quantize_block", full)
    with pytest.raises(ConfigError, match=r"model\.layers\.0 does not fit into the free memory of cpu: free some"):
        quantize(source, tmp_path / "out", **QUICK)


@pytest.mark.parametrize("switch", ["older", "newer", "left alone"])
def test_float32_is_float32_whatever_the_caller_allows(source, tmp_path, monkeypatch, switch):
    real, found = search_module.quantize_block, set()

    def spy(*args, **kwargs):
        found.add((torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()))
        return real(*args, **kwargs)

    monkeypatch.setattr(search_module, "quantize_block", spy)
    matmul = torch.backends.cuda.matmul
    try:
        if switch == "older":
            torch.set_float32_matmul_precision("high")
        elif switch == "newer":
            matmul.fp32_precision = "tf32"
        before = matmul.fp32_precision
        quantize(source, tmp_path / "out", **QUICK)
        assert found <= {("ieee", "highest"), ("none", "highest")}
        assert matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "none"


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon", "mixtral"])
def test_export_dense_computes_what_the_model_did(name, tmp_path, load, ids):
    folder = dense_folder(tmp_path / "dense", name)
    report = quantize(folder, tmp_path / "out", **QUICK, export_dense=True)
    assert report.quantized == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        wanted, got = (load(path, dtype=torch.float32)(ids).logits for path in (folder, tmp_path / "out"))
    assert (got - wanted).norm() <= 2e-3 * wanted.norm()  # the scaled weights are rounded to float16


def test_nan_is_refused_and_named(spoil, tmp_path):
    def change(stored):
        stored["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")

    folder = spoil(change)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"):
        quantize(folder, tmp_path / "out", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_dead_channels_are_said_and_do_no_harm(spoil, tmp_path, load, ids):
    def change(stored):
        stored["model.layers.0.mlp.up_proj.weight"][5] = 0
        stored["model.layers.0.input_layernorm.weight"][7] = 0

    report = quantize(spoil(change), tmp_path / "out", **QUICK)
    assert "model.layers.0: mlp.down_proj: 1 input channels are zero on all calibration tokens" in report.notes
    with torch.no_grad():
        assert load(tmp_path / "out")(ids).logits.isfinite().all()


def test_experts_that_no_token_reached(tmp_path, load, ids):
    folder = dense_folder(tmp_path / "dense", "mixtral", num_local_experts=8)
    stored = load_file(folder / "model.safetensors")
    router = next(key for key in stored if key.endswith("layers.0.block_sparse_moe.gate.weight"))
    stored[router][2:] = stored[router][:1] * 1e-3  # ties: no token prefers these
    stored[router][1] = -stored[router][0]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    report = quantize(folder, tmp_path / "out", **QUICK)
    assert any("no calibration token was sent there" in note for note in report.notes)
    with torch.no_grad():
        assert load(tmp_path / "out")(ids).logits.isfinite().all()


def test_too_little_text(source, tmp_path):
    (tmp_path / "little.txt").write_text("Not much. " * 10)
    with pytest.raises(ConfigError, match=r"100 tokens of calibration text make 2 windows of 48, wanted 4: give more"):
        quantize(source, tmp_path / "out", **QUICK, calib=tmp_path / "little.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["little.txt"]


def test_a_model_without_a_tokenizer(tmp_path):
    tiny_model(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"has no tokenizer .* or use --method rtn"):
        quantize(tmp_path / "dense", tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"speed": 11}, "quantize has no option 'speed'"),
        ({"damping": 0.0}, "damping and correct_damping are factors above 0"),
        ({"correct": 0.5}, "needs propagate=True"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"calib": "nowhere.txt"}, r"nowhere\.txt: no such file or folder"),
    ],
)
def test_wrong_options_are_one_sentence(source, tmp_path, options, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        quantize(source, tmp_path / "out", **(QUICK | options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
