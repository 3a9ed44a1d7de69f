"""save_pretrained writes checkpoint bytes back, whatever was bound, moved or cast in between."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from awq_core.checkpoint import checkpoint_files

QUANTIZED = ("qweight", "qzeros", "scales")


@pytest.fixture
def assert_same(tensors):
    """Compare a saved folder with the original: same keys, and bit for bit the same quantized tensors."""

    def check(folder, source, dtype=None):
        before, after = tensors(source), tensors(folder)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            if name.endswith(QUANTIZED):
                assert after[name].dtype == tensor.dtype, name
                assert torch.equal(after[name], tensor), name
            else:
                assert torch.equal(after[name], tensor.to(dtype or after[name].dtype)), name
        config = json.loads((folder / "config.json").read_text())
        original = json.loads((source / "config.json").read_text())
        assert config["quantization_config"] == original["quantization_config"]

    return check


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama_bias", {}),
        ("llama_tied", {"layout": "gemv"}),
        ("llama", {"layout": "gemv_fast"}),
        ("llama", {"zero_point": False}),
        ("falcon", {}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("mixtral", {"layout": "gemv"}),
    ],
    ids=str,
)
def test_bit_identical_and_loads_again(backend, checkpoint, load, ids, assert_same, tmp_path, architecture, options):
    source = checkpoint(architecture, **options)
    model = load(source, dtype=torch.float32)
    with torch.no_grad():
        before = model(ids).logits
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, source)
    again = load(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_after_casting_there_and_back(backend, checkpoint, load, ids, assert_same, tmp_path):
    source = checkpoint("llama_bias")
    model = load(source, dtype=torch.float32)
    model.to(torch.bfloat16)
    model(ids)
    model.to(torch.float32)
    model.save_pretrained(tmp_path)
    before = load(source, dtype=torch.bfloat16).to(torch.float32)
    before.save_pretrained(tmp_path / "wanted")
    assert_same(tmp_path, tmp_path / "wanted")


def test_scaled_activations_survive_casting(checkpoint, load, tensors, tmp_path):
    source = checkpoint("falcon")
    stored = tensors(source)
    scales = {f"transformer.h.{i}.mlp.act.scales": torch.rand(256).half() + 0.5 for i in range(2)}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(stored | scales, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    model = load(tmp_path / "in", dtype=torch.float32)
    model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    saved = tensors(tmp_path / "out")
    for name, tensor in scales.items():
        assert saved[name].dtype == torch.float16
        assert torch.equal(saved[name], tensor)


def test_shards(backend, checkpoint, load, assert_same, tmp_path):
    load(checkpoint("mixtral"), dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(checkpoint_files(tmp_path)) > 3
    assert_same(tmp_path, checkpoint("mixtral"))
    load(tmp_path)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_offloaded_to_disk(checkpoint, load, assert_same, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    folder = str(tmp_path / "offload")
    model = load(checkpoint(), dtype=torch.float32, device_map=places, offload_folder=folder)
    model.save_pretrained(tmp_path / "out")
    assert_same(tmp_path / "out", checkpoint())


def test_what_other_loaders_expect(backend, checkpoint, load, tmp_path):
    """Names, shapes and dtypes as AutoAWQ's WQLinear_GEMM and transformers' own AWQ quantizer build them."""
    load(checkpoint("llama_bias"), dtype=torch.float16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    assert wanted.items() <= config["quantization_config"].items()
    assert config["dtype"] == "float16"
    sizes = {"q_proj": (64, 64), "k_proj": (64, 32), "gate_proj": (64, 128), "down_proj": (128, 64)}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = list(file.keys())
        for part, (k, n) in sizes.items():
            block = "mlp" if part in ("gate_proj", "down_proj") else "self_attn"
            prefix = f"model.layers.0.{block}.{part}."
            expected = {
                "qweight": ("I32", [k, n * 4 // 32]),
                "qzeros": ("I32", [math.ceil(k / 32), n * 4 // 32]),
                "scales": ("F16", [math.ceil(k / 32), n]),
                "bias": ("F16", [n]),
            }
            found = {name.removeprefix(prefix): file.get_slice(name) for name in names if name.startswith(prefix)}
            assert {s: (t.get_dtype(), t.get_shape()) for s, t in found.items()} == expected


def test_state_dict_round_trip(backend, checkpoint, load, ids):
    model, other = (load(checkpoint("llama_bias"), dtype=torch.float32) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in other.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert not any("resident" in name for name in state)
    q = model.model.layers[0].self_attn.q_proj
    scaled = {"model.layers.0.self_attn.q_proj.scales": state["model.layers.0.self_attn.q_proj.scales"] * 2}
    with torch.no_grad():
        before = other(ids).logits
        other.load_state_dict(state | scaled)
        assert not torch.allclose(other(ids).logits, before)
        other.load_state_dict(state)
        assert torch.equal(other(ids).logits, before)
    assert q.plans


def test_deepcopy_of_a_model(backend, checkpoint, load, ids):
    model = load(checkpoint("mixtral"), dtype=torch.float32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    twin.to(torch.bfloat16)
    assert model.dtype == torch.float32
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in twin.state_dict().items() if "proj_q" in name)
