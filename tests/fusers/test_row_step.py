"""The CPU's decode step of one sequence, the memory in float32 beneath it, and the head in 8 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from awq_core.errors import ConfigError
from awq_core.hf.decode import ENGINE, StaticMemory, detach
from awq_fusers import decode
from awq_fusers.decode import head, row_step, storage
from awq_fusers.decode.row_step import RowStep
from awq_fusers.decode.step import TorchStep

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 5,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "sliding": ("Mistral", {"sliding_window": 8}),
    "soft caps": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "q and k norms": ("Qwen3", {"head_dim": 32}),
    "partial rope": (
        "Phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
}


def make(name: str = "llama", **sizes: Any) -> Any:
    """A dense model in float32 whose tokens vary."""
    family, own = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(SIZES | own | sizes))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.mul_(6)
    return model


def prompt(length: int = 12, batch: int = 1) -> torch.Tensor:
    return torch.randint(6, 96, (batch, length), generator=torch.Generator().manual_seed(3))


def step_of(model: Any, batch: int = 1) -> Any:
    engine = model.__dict__[ENGINE]
    engine.refresh()
    with engine.session(batch, 40) as session:
        return session.step


def answer(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, **options)


@pytest.mark.parametrize("name", MODELS)
def test_long_attention_is_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    plain = answer(model, prompt())
    monkeypatch.setattr(row_step, "NUMPY_BYTES", 0)
    decode.install(model)
    assert type(step_of(model)) is RowStep
    assert answer(model, prompt()).tolist() == plain.tolist()


def test_one_sequence_with_padding() -> None:
    model = make()
    ids = prompt()
    ids[0, :3] = 0
    mask = (torch.arange(12) >= 3).long()[None]
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=16)
    decode.install(model)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=16).tolist() == plain.tolist()
    assert answer(model, prompt()).shape == (1, 28)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_16_bits_are_as_near_to_float32_as_the_models_own(name: str, dtype: torch.dtype) -> None:
    exact = make(name).to(dtype).float()  # the same rounded weights
    model = copy.deepcopy(exact).to(dtype)
    ids = prompt(40, batch=1)
    with torch.no_grad():
        wanted = exact(ids).logits[:, 12:]
        own = model(ids).logits[:, 12:].float()
    for batch in (1, 3):
        mine = _teacher_forced(model, ids.expand(batch, -1), 12)
        assert (mine - wanted).norm() < 1.25 * (own - wanted).norm() * batch**0.5


@torch.no_grad()
def _teacher_forced(model: Any, ids: torch.Tensor, prefilled: int) -> torch.Tensor:
    decode.install(model)
    engine = model.__dict__[ENGINE]
    with engine.session(len(ids), ids.shape[1]) as session:
        assert session.storage.dtype == torch.float32
        session.start(0, None)
        model(ids[:, :prefilled], past_key_values=StaticMemory(session))
        logits = [session.logits(ids[:, t]).float().clone() for t in range(prefilled, ids.shape[1])]
    detach(model)
    return torch.stack(logits, 1)


def test_much_memory_stays_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().to(torch.bfloat16)
    decode.install(model)
    assert type(step_of(model)) is RowStep
    model.__dict__[ENGINE].release()
    monkeypatch.setattr(storage, "WIDE_BYTES", 0)
    step = step_of(model)
    assert type(step) is TorchStep
    assert step.layers[0].cache.dtype == torch.bfloat16
    assert answer(model, prompt()).shape == (1, 28)


def test_a_users_cache_is_in_the_models_dtype() -> None:
    model = make().to(torch.bfloat16)
    decode.install(model)
    kept = answer(model, prompt(), return_dict_in_generate=True).past_key_values
    assert kept.layers[0].keys.dtype == torch.bfloat16


def test_int8_head_is_asked_for_changes_little_and_is_taken_back() -> None:
    model = make(vocab_size=512).to(torch.bfloat16)
    ids = prompt(30)
    before = _teacher_forced(model, ids, 12)
    decode.install(model)
    decode.int8_head(model)
    engine = model.__dict__[ENGINE]
    assert engine.decoder.int8_head
    with engine.session(1, 40) as session:
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        wide, narrow = model.lm_head(x).float(), session.step.head(x).float()
    assert 1e-4 < (wide - narrow).norm() / wide.norm() < 2e-2
    assert answer(model, prompt()).shape == (1, 28)
    decode.int8_head(model, False)
    assert not engine.decoder.int8_head
    assert torch.equal(_teacher_forced(model, ids, 12), before)


def test_int8_head_refuses_what_it_does_not_serve() -> None:
    model = make()
    with pytest.raises(ConfigError, match="no fast decode step, because it was not asked for"):
        decode.int8_head(model)
    decode.install(model)
    with pytest.raises(ConfigError, match="no bfloat16 linear on a CPU"):
        decode.int8_head(model)


def test_rows_in_8_bits() -> None:
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[7] = 0
    codes, scales = head.quantized_rows(weight)
    error = (codes.float() * scales.float()[:, None] - weight.float()).abs().amax(-1)
    assert bool((error <= 0.51 * scales.float() + 0.005 * weight.float().abs().amax(-1)).all())
    assert not codes[7].any()
