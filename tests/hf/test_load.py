"""from_pretrained: every architecture, layout, dtype, device map and file format gives the dense model's logits."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import awq_core
from awq_core.checkpoint import checkpoint_files
from awq_core.experts import AwqExperts
from awq_core.hf.scaled_activation import ScaledActivation
from awq_core.linear import AwqLinear
from awq_core.packed import PackedModule
from awq_core.testing.tiny import ARCHITECTURES

PASSED = "ignore:You passed `quantization_config`:UserWarning"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OFFLOAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def packed(model) -> dict[str, PackedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


@pytest.fixture
def same_logits(load, dense, ids, assert_close):
    """Load a checkpoint and its dense oracle, compare logits, return the model."""

    def check(folder, source=None, **options):
        model = load(folder, **options)
        oracle = load(dense(source or folder), dtype=torch.float32)
        with torch.no_grad():
            assert_close(model(ids).logits, oracle(ids).logits)
        return model

    return check


def test_the_number_of_threads_stays(checkpoint, load):
    """Modules are bound in threads of one thread each, and that must not be what later threads begin with."""
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        load(checkpoint("llama"), dtype=torch.bfloat16)
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *seen] == [3, 3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(checkpoint, same_logits, architecture):
    model = same_logits(checkpoint(architecture), dtype=torch.float32)
    found = packed(model)
    experts = [name for name, module in found.items() if isinstance(module, AwqExperts)]
    assert len(experts) == (2 if architecture in ("mixtral", "qwen3_moe") else 0)
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == ["lm_head"]
    assert all(module.plans for module in found.values())


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast"])
@pytest.mark.parametrize("architecture", ["llama_bias", "falcon", "mixtral"])
def test_layouts(checkpoint, same_logits, architecture, layout):
    model = same_logits(checkpoint(architecture, layout=layout), dtype=torch.float32)
    specs = [weight.spec for module in packed(model).values() for weight in module.packed.values()]
    assert {(spec.layout, spec.group_size) for spec in specs} == {(layout, 32)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["llama_bias", "qwen3_moe"])
def test_dtypes(checkpoint, same_logits, architecture, dtype):
    model = same_logits(checkpoint(architecture), dtype=dtype)
    assert model.dtype == dtype
    assert {module.dtype for module in packed(model).values()} == {dtype}


def test_symmetric_and_one_group_a_column(checkpoint, same_logits):
    same_logits(checkpoint(zero_point=False), dtype=torch.float32)
    model = same_logits(checkpoint(group_size=-1), dtype=torch.float32)
    assert packed(model)["model.layers.0.mlp.down_proj"].spec.group_size == 128


def test_tied_embeddings_stay_tied(checkpoint, same_logits):
    model = same_logits(checkpoint("llama_tied"), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(checkpoint, same_logits, device_map):
    model = same_logits(checkpoint(), dtype=torch.float32, device_map=device_map)
    assert model.to("cpu") is model
    assert {module.weight_state.device().type for module in packed(model).values()} == {"cpu"}
    assert next(model.parameters()).device.type == model.device.type == "cpu"


@pytest.mark.parametrize("architecture", ["llama_bias", "mixtral"])
def test_offload_to_disk(backend, checkpoint, same_logits, tmp_path, architecture, ids):
    options = {"device_map": OFFLOAD, "offload_folder": str(tmp_path)}
    model = same_logits(checkpoint(architecture), dtype=torch.float32, **options)
    offloaded = packed(model)["model.layers.1.self_attn.q_proj"]
    assert offloaded.qweight.device.type == "meta"
    assert offloaded.weight_state.plan.resident.name == "gemm"  # kept as it is stored: nothing could be repacked
    with torch.autocast("cpu", dtype=torch.bfloat16):  # binds anew, and must not repack then either
        model(ids)
    assert offloaded.qweight.device.type == "meta"
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}], ids=["unnamed", "auto"])
def test_an_unnamed_dtype_is_bfloat16_on_a_cpu_and_the_user_is_told_once(checkpoint, load, told, options):
    assert load(checkpoint(), **options).dtype == torch.bfloat16
    assert load(checkpoint(), **options).dtype == torch.bfloat16
    assert [note for note in told() if "bfloat16" in note] == [
        "on a CPU an AWQ model runs in bfloat16, which is fast there; pass dtype=torch.float16 to keep float16"
    ]


@pytest.mark.parametrize("name", ["float16", "float32", "bfloat16"])
def test_a_named_dtype_is_honoured_without_a_word(checkpoint, load, told, name):
    for options in ({"dtype": name}, {"dtype": getattr(torch, name)}, {"torch_dtype": getattr(torch, name)}):
        assert load(checkpoint(), **options).dtype == getattr(torch, name)
    assert told() == []


def test_a_checkpoint_in_bfloat16_stays_so_without_a_word(checkpoint, same_logits, told):
    assert same_logits(checkpoint(dtype="bfloat16")).dtype == torch.bfloat16
    assert told() == []


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(checkpoint, same_logits, implementation):
    model = same_logits(checkpoint(), dtype=torch.float32, attn_implementation=implementation)
    assert model.config._attn_implementation == implementation


def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_shards(checkpoint, same_logits):
    folder = checkpoint("mixtral", max_shard_size=20_000)
    assert len(checkpoint_files(folder)) > 3
    same_logits(folder, dtype=torch.float32)


def test_pytorch_bin(checkpoint, same_logits, tensors, tmp_path):
    source = checkpoint("llama_bias")
    folder = copied(source, tmp_path / "bin")
    torch.save(tensors(source), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    same_logits(folder, source=source, dtype=torch.float32)


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json"])
def test_legacy_config_file(checkpoint, same_logits, tmp_path, name):
    source = checkpoint(layout="gemv", group_size=64)  # where g cannot be read from shapes alone
    folder = copied(source, tmp_path / "legacy")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    legacy = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV"}
    (folder / name).write_text(json.dumps(legacy))
    model = same_logits(folder, source=source, dtype=torch.float32)
    assert model.config.quantization_config.group_size == 64
    assert model.config.quantization_config.to_dict()["w_bit"] == 4


def test_aliases_in_config_json(checkpoint, same_logits, tmp_path):
    source = checkpoint(group_size=64)
    folder = copied(source, tmp_path / "aliases")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    (folder / "config.json").write_text(json.dumps(config))
    model = same_logits(folder, source=source, dtype=torch.float32)
    assert packed(model)["model.layers.0.mlp.up_proj"].spec.group_size == 64


@pytest.mark.parametrize(
    "lie", [{"version": "gemv"}, {"version": "gemv_fast"}, {"version": "gemv", "backend": "llm-awq"}], ids=str
)
def test_a_lying_version_is_resolved_and_told(checkpoint, same_logits, told, tmp_path, lie):
    folder = copied(checkpoint(), tmp_path / "lie")
    edit_config(folder, **lie)
    model = same_logits(folder, source=checkpoint(), dtype=torch.float32)
    assert {module.spec.layout for module in packed(model).values()} == {"gemm"}
    assert len(told()) == 1
    assert "but the tensors lie in the gemm layout: gemm is used" in told()[0]


def test_a_wrong_group_size_is_resolved_and_told(checkpoint, same_logits, told, tmp_path):
    folder = copied(checkpoint(), tmp_path / "group")
    edit_config(folder, group_size=64)
    same_logits(folder, source=checkpoint(), dtype=torch.float32)
    assert told() == ["the config says group_size 64, but the tensors have 32: 32 is used"]


def test_modules_to_not_convert(checkpoint, same_logits):
    model = same_logits(checkpoint(modules_to_not_convert=["k_proj", "layers.1.mlp"]), dtype=torch.float32)
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    mlp = {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert left == {"lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", *mlp}


@pytest.mark.parametrize("words", [["gate"], ["visual"], ["model.layers.0"], None], ids=str)
def test_the_header_decides_whatever_the_config_says_of_skipped_modules(checkpoint, same_logits, tmp_path, words):
    """["gate"] is a substring for AutoAWQ (it would skip gate_proj) and a prefix for transformers (it would not)."""
    folder = copied(checkpoint(), tmp_path / "words")
    edit_config(folder, modules_to_not_convert=words)
    model = same_logits(folder, source=checkpoint(), dtype=torch.float32)
    assert len(packed(model)) == 14


def scaled(checkpoint, tensors, folder, seed=0):
    """A Falcon whose activations are scaled by a tensor beside them, and a dense one that has it in the next weight."""
    source = checkpoint("falcon")
    stored = tensors(source)
    generator = torch.Generator().manual_seed(seed)
    for i in range(2):
        stored[f"transformer.h.{i}.mlp.act.scales"] = (torch.rand(256, generator=generator) + 0.5).half()
    copied(source, folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_activations(checkpoint, load, dense, tensors, tmp_path, ids, assert_close, dtype):
    stored = scaled(checkpoint, tensors, tmp_path / "scaled")
    model = load(tmp_path / "scaled", dtype=dtype)
    oracle = load(dense(checkpoint("falcon")), dtype=torch.float32)
    for i, block in enumerate(oracle.transformer.h):
        scales = stored[f"transformer.h.{i}.mlp.act.scales"].float()
        block.mlp.dense_4h_to_h.weight.data /= scales
        act = model.transformer.h[i].mlp.act
        assert isinstance(act, ScaledActivation)
        assert act.scales.dtype == torch.float16
        assert not act.scales.requires_grad
        assert torch.equal(act.scales, stored[f"transformer.h.{i}.mlp.act.scales"])
    with torch.no_grad():
        assert_close(model(ids).logits, oracle(ids).logits)


@pytest.mark.filterwarnings(PASSED)
def test_a_forced_backend_is_taken(checkpoint, same_logits):
    config = awq_core.AwqConfig(version="reference")
    model = same_logits(checkpoint(), dtype=torch.float32, quantization_config=config)
    for module in packed(model).values():
        assert {band.candidate.backend for band in module.weight_state.plan.bands} == {"reference"}
    model.to(torch.bfloat16)  # binds anew, with the same request
    assert {module.weight_state.plan.decision.request.forced for module in packed(model).values()} == {"reference"}


def test_prefer_and_the_environment(checkpoint, load, monkeypatch, toy):
    names = lambda model: {m.weight_state.plan.decision.chosen.backend for m in packed(model).values()}  # noqa: E731
    assert names(load(checkpoint())) == {"toy"}
    with awq_core.prefer("reference"):
        assert names(load(checkpoint())) == {"reference"}
    monkeypatch.setenv("AWQ_CORE_BACKEND", "reference")
    assert names(load(checkpoint())) == {"reference"}
    monkeypatch.delenv("AWQ_CORE_BACKEND")
    monkeypatch.setenv("AWQ_CORE_DISABLE", "toy.bytes")
    assert names(load(checkpoint())) == {"reference"}


def test_numbers_that_people_read_off_a_model(backend, checkpoint, load):
    model = load(checkpoint("llama_bias"), dtype=torch.float32)
    weights = [tensor for m in packed(model).values() for tensor in m.weight_state.tensors().values()]
    others = [p for name, p in model.named_parameters() if not name.endswith(("qweight", "qzeros", "scales"))]
    counted = sum(tensor.nbytes for tensor in [*weights, *others]) + sum(
        tensor.nbytes for name, tensor in model.named_buffers() if "resident" not in name
    )
    assert model.get_memory_footprint() == counted
    trainable = model.num_parameters(only_trainable=True)
    assert trainable == sum(p.numel() for p in others)
    assert model.num_parameters() in (trainable, trainable + sum(tensor.numel() for tensor in weights))


def test_compiled_model(backend, checkpoint, load, ids):
    torch._dynamo.reset()
    model = load(checkpoint(), dtype=torch.float32)
    assert model.hf_quantizer.is_compileable
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted)


def test_training_an_adapter_reaches_the_first_layer(backend, checkpoint, load, ids):
    model = load(checkpoint(), dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    grad = model.model.layers[0].input_layernorm.weight.grad
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith(("qweight", "qzeros", "scales")))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_dequantize(backend, checkpoint, load, dense, ids, assert_close, dtype):
    folder = checkpoint("llama_bias")
    model = load(folder, dtype=torch.float32).dequantize(dtype)
    assert not packed(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.weight.dtype == (dtype or torch.float32)
    assert not hasattr(model.config, "quantization_config")
    oracle = load(dense(folder), dtype=torch.float32)
    state = oracle.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def test_dequantize_of_experts_says_no(checkpoint, load):
    with pytest.raises(NotImplementedError, match="experts: quantized experts cannot be made dense yet"):
        load(checkpoint("mixtral"), dtype=torch.float32).dequantize()


def test_a_linear_of_a_loaded_model_is_ours(checkpoint, load):
    model = load(checkpoint(), dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn.q_proj, AwqLinear)
    assert not model.model.layers[0].self_attn.q_proj.training
    assert model.quantization_method == "awq"
    assert model.is_quantized
