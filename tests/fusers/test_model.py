"""Fused models as wholes: saved, unfused, moved, offloaded, copied, adapted."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import awq_core
from awq_core import ConfigError
from awq_core.linear import AwqLinear
from awq_core.packed import PackedModule
from awq_fusers import fuse, unfuse
from awq_fusers.joined import JoinedLinear, JoinedPart

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

FUSE = {"bits": 4, "do_fuse": True, "fuse_max_seq_len": 96}


def readers(model):
    return [module for module in model.modules() if isinstance(module, JoinedPart | JoinedLinear)]


SAVED = [
    ("llama_bias", {}),
    ("llama_tied", {"layout": "gemv"}),
    ("llama", {"layout": "gemv_fast"}),
    ("llama", {"zero_point": False}),
    ("qwen3_moe_dense_first", {}),
    ("mixtral", {"layout": "gemv"}),
    ("falcon", {}),
]


@pytest.mark.parametrize(("name", "options"), SAVED, ids=str)
def test_saving_is_bit_identical_and_loads_unfused(
    backend, folder_of, load_model, prompt, tokens, tmp_path, name, options
):
    folder = folder_of(name, **options)
    model = load_model(folder, quantization_config=awq_core.AwqConfig(**FUSE))
    answer = tokens(model, prompt(2))
    before = load_file(folder / "model.safetensors")
    if model.config.model_type in ("llama", "falcon"):  # MoE experts are renamed on loading
        plain = load_model(folder)
        assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        quantized = key.endswith(("qweight", "qzeros", "scales"))
        assert after[key].dtype == tensor.dtype or not quantized
        assert torch.equal(after[key], tensor if quantized else tensor.to(after[key].dtype)), key
    configs = [json.loads((place / "config.json").read_text())["quantization_config"] for place in (folder, tmp_path)]
    assert configs[0] == configs[1]
    again = load_model(tmp_path)
    assert readers(again) == []
    assert tokens(again, prompt(2)) == answer


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "qwen3_moe"])
def test_unfusing_restores(backend, fresh, prompt, tokens, name):
    plain, fused = fresh(name)
    fused.unfuse()
    assert readers(fused) == []
    assert not {"awq_fused", "unfuse", "generate"} & set(fused.__dict__)
    assert [path for path, _ in fused.named_modules()] == [path for path, _ in plain.named_modules()]
    wanted, found = plain.state_dict(), fused.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert all(module.plans for module in fused.modules() if isinstance(module, PackedModule))
    assert tokens(fused, prompt(2), 90) == tokens(plain, prompt(2), 90)  # no limit is left
    unfuse(fused)
    record = fuse(fused)
    assert record is fused.awq_fused
    assert record.max_seq_len is None
    assert tokens(fused, prompt(2), 90) == tokens(plain, prompt(2), 90)


def test_fusing_a_loaded_model(backend, folder_of, load_model, prompt, tokens):
    model = load_model(folder_of("qwen2"))
    answer = tokens(model, prompt(2))
    record = fuse(model, max_seq_len=40)
    assert record.joined == 10
    assert all(module.plans for module in model.modules() if isinstance(module, PackedModule))
    assert tokens(model, prompt(2)) == answer
    with pytest.raises(ConfigError, match=r"this model is fused already: call model\.unfuse"):
        fuse(model)
    with pytest.raises(ConfigError, match="fuse_max_seq_len=40"):
        tokens(model, prompt(2), 90)


def test_somebody_elses_generate_is_kept(folder_of, load_model, prompt):
    model = load_model(folder_of("llama"))
    model.generate = lambda *args, **kwargs: "theirs"
    fuse(model, max_seq_len=40)
    assert model.generate(**prompt(1), max_new_tokens=3) == "theirs"
    with pytest.raises(ConfigError, match="fuse_max_seq_len=40"):
        model.generate(**prompt(1), max_new_tokens=90)
    model.unfuse()
    assert model.generate(**prompt(1), max_new_tokens=90) == "theirs"


def test_a_model_without_generate(folder_of, prompt):
    import transformers

    model = transformers.AutoModel.from_pretrained(folder_of("llama"), dtype=torch.float32)
    before = model(**prompt(2)).last_hidden_state
    assert fuse(model).layers[0].name == "layers.0"
    torch.testing.assert_close(model(**prompt(2)).last_hidden_state, before)
    model.unfuse()
    assert torch.equal(model(**prompt(2)).last_hidden_state, before)


def test_memory_is_not_doubled(pair):
    plain, fused = pair("llama")
    assert fused.num_parameters() == plain.num_parameters()
    assert fused.get_memory_footprint() == plain.get_memory_footprint()


def test_loading_a_state_dict_into_a_fused_model(fresh, folder_of, prompt, tokens):
    plain, fused = fresh("llama")
    other, _ = fresh("llama_mha")
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    for key in [key for key in state if "q_proj" in key or "down_proj" in key]:
        state[key] = other.state_dict()[key].clone()
    plain.load_state_dict(state)
    fused.load_state_dict(state)
    assert tokens(fused, prompt(2)) == tokens(plain, prompt(2))


def test_copies_are_their_own(fresh, prompt, tokens):
    _, fused = fresh("llama")
    twin = copy.deepcopy(fused)
    answer = tokens(fused, prompt(2))
    assert twin.awq_fused.layers[0].qkv is twin.model.layers[0].self_attn.qkv_joined
    fused.model.embed_tokens.weight.data.zero_()
    assert tokens(twin, prompt(2)) == answer
    twin.unfuse()
    assert readers(twin) == []
    assert readers(fused)


def test_moving(fresh, prompt, tokens):
    plain, fused = fresh("llama")
    assert fused.to("cpu") is fused
    assert fused.to(torch.bfloat16).dtype == torch.bfloat16
    plain.to(torch.bfloat16)
    assert {layer.qkv.dtype for layer in fused.awq_fused.layers} == {torch.bfloat16}
    assert fused.state_dict()["model.layers.0.self_attn.q_proj.scales"].dtype == torch.float16
    a, b = (model(**prompt(2)).logits.float() for model in (fused, plain))
    assert (a - b).norm() / b.norm() < 0.02


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_maps(folder_of, load_model, pair, prompt, tokens, device_map):
    options = {"device_map": device_map} if isinstance(device_map, dict) else {"device_map": "auto"}
    model = load_model(folder_of("llama"), quantization_config=awq_core.AwqConfig(**FUSE), **options)
    assert model.awq_fused.joined == 10
    assert tokens(model, prompt(2)) == tokens(pair("llama")[0], prompt(2))


OFFLOAD = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}


def test_offloaded_blocks_stay_as_they_are(backend, folder_of, load_model, pair, prompt, tokens, told, tmp_path):
    device_map = OFFLOAD | {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load_model(
        folder_of("llama_bias"),
        quantization_config=awq_core.AwqConfig(**FUSE),
        device_map=device_map,
        offload_folder=str(tmp_path),
    )
    assert [len(layer.qkv_sizes) for layer in model.awq_fused.layers] == [3, 0]
    assert isinstance(model.model.layers[1].self_attn.q_proj, AwqLinear)
    assert told() == [
        "model.layers.1.self_attn (and 1 more) stays unfused: "
        "its weights are offloaded, so they stay as they are stored"
    ]
    answer = tokens(pair("llama_bias")[0], prompt(2))
    assert tokens(model, prompt(2)) == answer
    model.unfuse()
    assert tokens(model, prompt(2)) == answer


def test_compiled_whole(fresh, prompt):
    plain, fused = fresh("qwen3")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**prompt(2, 9), use_cache=False).logits
        torch.testing.assert_close(found, plain(**prompt(2, 9)).logits, rtol=1e-4, atol=1e-5)
    assert all(layer.qkv._held is None and layer.gate_up._held is None for layer in fused.awq_fused.layers)


def test_hooks_on_a_projection_survive(folder_of, load_model, prompt):
    """A hook sees its projection again after unfusing; while fused, the joined product is where hooks belong."""
    model = load_model(folder_of("llama"))
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("q"))
    fuse(model)
    model(**prompt(1))
    model.unfuse()
    model(**prompt(1))
    assert seen == ["q"]


def test_dequantizing(fresh, prompt):
    plain, fused = fresh("llama")
    wanted = plain(**prompt(2)).logits
    fused.dequantize()
    assert not [module for module in fused.modules() if isinstance(module, PackedModule | JoinedPart)]
    assert isinstance(fused.model.layers[0].self_attn.q_proj, nn.Linear)
    torch.testing.assert_close(fused(**prompt(2)).logits, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradients_of_an_adapter(fresh, prompt):
    """Training beside the frozen weights: the same gradients, also under gradient checkpointing."""
    grads = []
    for model, checkpointing in zip((*fresh("llama"), fresh("llama")[1]), (False, False, True), strict=True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        embeds = model.get_input_embeddings()(prompt(2)["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("when", ["fused first", "adapter first"])
def test_lora(fresh, folder_of, load_model, prompt, tokens, when, told):
    """The adapter learns and answers the same on either model, and outlives unfusing."""
    peft = pytest.importorskip("peft")
    from awq_core.hf.peft import lora_config

    def adapted(model):
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "init_lora_weights": False}
        torch.manual_seed(0)
        return peft.get_peft_model(model, lora_config(**options))

    plain, fused = fresh("llama")
    plain = adapted(plain)
    if when == "fused first":
        fused = adapted(fused)
    else:
        fused = adapted(load_model(folder_of("llama")))
        record = fuse(fused.base_model.model)
        assert record.joined == 0  # they are wrapped by then, and stay as they are
        assert any("stays unfused: q_proj is a AwqLoraLinear" in note for note in told())
    assert sum(p.numel() for p in fused.parameters() if p.requires_grad) > 0
    wanted = tokens(plain, prompt(2))
    assert tokens(fused, prompt(2)) == wanted
    for model in (plain, fused):
        model.train()
        model(**prompt(2)).logits.square().mean().backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if "lora_" in n} for model in (plain, fused)]
    assert grads[0].keys() == grads[1].keys()
    assert all(grad is not None for grad in grads[1].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-7)
    fused.eval().base_model.model.unfuse()
    assert readers(fused) == []
    assert tokens(fused, prompt(2)) == wanted
