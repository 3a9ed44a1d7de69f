"""AwqExperts against the same experts as dense matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from awq_core.experts import AwqExperts
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.quantization.rtn import quantize_weight

E, H, INNER, G, T, TOP = 4, 64, 96, 32, 9, 2


class Dense(nn.Module):
    """The plainest way to say what the experts compute: every expert for every token, then the sum of those wanted."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down  # [E, 2I, H], [E, H, I]

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("th,eih->eti", x, self.gate_up).chunk(2, dim=-1)
        every = torch.einsum("eti,ehi->eth", nn.functional.silu(gate) * up, self.down)
        out = torch.zeros_like(x)
        for place in range(index.shape[1]):
            for token in range(x.shape[0]):
                expert = int(index[token, place])
                if expert < E:
                    out[token] += weights[token, place] * every[expert, token]
        return out


def make(layout: str = "gemm") -> tuple[AwqExperts, dict[str, torch.Tensor], Dense]:
    generator = torch.Generator().manual_seed(0)
    experts = AwqExperts(E, H, INNER, nn.functional.silu, G, layout, dtype=torch.float32)
    state: dict[str, torch.Tensor] = {}
    dense = []
    for name, n, k in (("gate_up_proj", 2 * INNER, H), ("down_proj", H, INNER)):
        codes = [quantize_weight(torch.randn(n, k, generator=generator) / k**0.5, G) for _ in range(E)]
        packed = [checkpoint_layout(layout).pack(c) for c in codes]
        state |= {f"{name}_{suffix}": torch.stack([p[suffix] for p in packed]) for suffix in packed[0]}
        dense.append(torch.stack([dequantize(c, torch.float32).T for c in codes]))
    assert list(experts.state_dict()) == list(state)
    experts.load_state_dict(state)
    return experts, state, Dense(*dense)


def routed(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [T, H], experts [T, TOP] of which expert 3 is never one, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:TOP] for _ in range(T)])
    return torch.randn(T, H, generator=generator), index, torch.rand(T, TOP, generator=generator)


def assert_same_state(experts: AwqExperts, state: dict[str, torch.Tensor]) -> None:
    found = experts.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
def test_numerics(backend, layout):
    experts, state, dense = make(layout)
    x, index, weights = routed()
    torch.testing.assert_close(experts(x, index, weights), dense(x, index, weights), atol=1e-4, rtol=1e-4)
    assert_same_state(experts, state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(backend, dtype):
    experts, state, dense = make()
    x, index, weights = routed()
    y = experts(x.to(dtype), index, weights)  # routers give float32 weights whatever the model's dtype is
    assert y.dtype == dtype
    assert experts.plans["down_proj"].spec.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(y.float(), dense(x, index, weights), atol=0.06, rtol=0.06)
    assert_same_state(experts, state)


def test_only_the_experts_that_are_hit_run(backend, monkeypatch):
    experts, _, _ = make()
    x, index, weights = routed()
    ran: list[int] = []
    project = AwqExperts._project
    monkeypatch.setattr(AwqExperts, "_project", lambda self, n, e, x: ran.append(e) or project(self, n, e, x))
    experts(x, index, weights)
    assert ran == [0, 0, 1, 1, 2, 2]


def test_tokens_of_other_ranks_are_left_out():
    experts, _, dense = make()
    x, index, weights = routed()
    index[::2, 0] = E
    torch.testing.assert_close(experts(x, index, weights), dense(x, index, weights), atol=1e-4, rtol=1e-4)


def test_no_tokens():
    experts, _, _ = make()
    empty = torch.empty(0, TOP)
    assert experts(torch.empty(0, H), empty.long(), empty).shape == (0, H)


def test_gradient(backend):
    experts, _, dense = make()
    x, index, weights = routed()
    found = []
    for module in (experts, dense):
        inputs, factors = x.clone().requires_grad_(), weights.clone().requires_grad_()
        module(inputs, index, factors).square().sum().backward()
        found.append((inputs.grad, factors.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_casting_leaves_codes_and_scales_alone(backend):
    experts, state, _ = make()
    experts.bind()
    experts.to(torch.bfloat16)
    assert experts.plans["gate_up_proj"].spec.dtype == "bfloat16"
    assert_same_state(experts, state)


def test_prepared_tensors_are_buffers(toy):
    experts, state, _ = make()
    experts.bind()
    assert not list(experts.parameters())
    sizes = sum(weight.plan.resident.nbytes(weight.plan.spec) for weight in experts.packed.values())
    assert sum(tensor.nbytes for tensor in experts.buffers()) == sizes
    assert_same_state(experts, state)


def test_deepcopy(backend):
    experts, state, _ = make()
    x, index, weights = routed()
    before = experts(x, index, weights)
    twin = copy.deepcopy(experts)
    assert twin.packed["down_proj"].owner is twin
    assert_same_state(twin, state)
    torch.testing.assert_close(twin(x, index, weights), before)
