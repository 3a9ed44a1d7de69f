"""Joined linears and their readers, without a model: numerics, state dicts, reading in any order, moving, copying."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from awq_core.layouts import checkpoint_layout
from awq_core.linear import AwqLinear
from awq_core.spec import LinearSpec
from awq_core.testing.data import random_codes
from awq_fusers.apply import GATE_UP, _join_block
from awq_fusers.joined import JoinedLinear, JoinedPart, refuses
from awq_fusers.plan import Block

K, SIZES, G = 128, (128, 64, 64), 64
NAMES = ("q", "k", "v")
LAYOUTS = ["gemm", "gemv", "gemv_fast", "llm_awq", "marlin"]


def linear(n=64, layout="gemm", bias=False, seed=0, k=K, g=G, dtype=torch.float32, zero_point=None):
    zero_point = layout != "marlin" if zero_point is None else zero_point
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(LinearSpec(k, n, g, layout, zero_point), generator)
    made = AwqLinear(k, n, g, layout, bias=bias, dtype=dtype, zero_point=zero_point)
    state = checkpoint_layout(layout).pack(codes)
    if bias:
        state["bias"] = torch.randn(n, generator=generator).to(dtype)
    made.load_state_dict(state)
    return made


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        for seed, (name, n) in enumerate(zip(NAMES, SIZES, strict=True)):
            setattr(self, name, linear(n, seed=seed, **options))
        self.o = linear(K, k=SIZES[0])

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q * torch.cat([k, v], -1).tanh())


def fused(block):
    """The same block with its projections joined."""
    _join_block(Block("block", block, NAMES, block.o), "qkv_joined")
    return block


@pytest.fixture
def x():
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(9))


def assert_same_state(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("bind_first", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_numbers_same_state(backend, layout, bind_first, x):
    plain = Attention(layout=layout, bias=True)
    wanted, state = plain(x), copy.deepcopy(plain.state_dict())
    block = copy.deepcopy(plain) if bind_first else Attention(layout=layout, bias=True)
    fused(block)
    assert bool(block.qkv_joined.plans) == bind_first
    torch.testing.assert_close(block(x), wanted)
    assert block.qkv_joined._held is None
    assert_same_state(block.state_dict(), state)
    storages = [tensor.untyped_storage().data_ptr() for tensor in block.state_dict().values()]
    assert len(set(storages)) == len(storages)  # or savers would take them for tied
    assert sum(p.numel() for p in block.q.parameters()) == 0
    parts = block.qkv_joined.split()
    for name, part in zip(NAMES, parts, strict=True):
        assert_same_state(part.state_dict(), {k[2:]: v for k, v in state.items() if k.startswith(f"{name}.")})
        assert bool(part.plans)


def test_one_product_for_one_input(x, monkeypatch):
    block = fused(Attention())
    calls = []
    forward = JoinedLinear.forward
    monkeypatch.setattr(JoinedLinear, "forward", lambda self, x: calls.append(x) or forward(self, x))
    block(x)
    assert len(calls) == 1
    block(x)
    assert len(calls) == 2  # the same input again is a new call
    block.v(x)
    block.k(x)
    assert len(calls) == 3  # in any order
    block.k(x)
    assert len(calls) == 4  # again, before q has read: anew
    block.q(x.clone())
    assert len(calls) == 5


@pytest.mark.parametrize("grad", [False, True])
def test_an_input_changed_in_place_is_another_input(x, grad):
    block, plain = fused(Attention()), Attention()
    with torch.set_grad_enabled(grad):
        block.q(x)
        x.mul_(2)
        torch.testing.assert_close(block.k(x), plain.k(x))


def test_an_interrupted_read_leaves_nothing_wrong(x):
    block, plain = fused(Attention()), Attention()
    block.q(x)
    y = x.flip(0).clone()
    torch.testing.assert_close(block(y), plain(y))
    assert block.qkv_joined._held is None


def test_different_inputs_for_keys_and_values(x):
    """As in cross-attention: slower, and right."""
    block, plain = fused(Attention()), Attention()
    memory = x.cos()
    for _ in range(2):
        for name, part in (("q", x), ("k", memory), ("v", memory)):
            torch.testing.assert_close(getattr(block, name)(part), getattr(plain, name)(part))


def test_two_threads_get_their_own_answers():
    block, plain = fused(Attention()), Attention()
    block(torch.zeros(1, K))
    wrong: list[float] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(60):
                x = torch.randn(3, K, generator=generator)
                error = (block(x) - plain(x)).abs().max().item()
                if error > 1e-4:
                    wrong.append(error)

    plain(torch.zeros(1, K))
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_loading_a_state_dict(backend, x):
    block, other = fused(Attention(bias=True)), Attention(bias=True)
    block(x)
    for seed, name in enumerate(NAMES, start=10):
        setattr(other, name, linear(SIZES[seed - 10], bias=True, seed=seed))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert not torch.allclose(block(x), other(x))
    block.load_state_dict(state)
    assert block.qkv_joined.plans
    torch.testing.assert_close(block(x), other(x))
    assert_same_state(block.state_dict(), state)
    del state["k.scales"]
    state["k.other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"k.scales".*Unexpected key.*"k.other"'):
        block.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"q.qweight has shape \[1\], wanted \[128, 16\]"):
        block.load_state_dict({"q.qweight": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch"])
def test_copies(backend, x, way):
    block = fused(Attention(bias=True))
    wanted, state = block(x), block.state_dict()
    block.q(x)  # a product that is held is not copied
    if way == "torch":
        buffer = io.BytesIO()
        torch.save(block, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = way(block)
    assert twin.q.joined is twin.qkv_joined is not block.qkv_joined
    assert twin.qkv_joined._held is None
    torch.testing.assert_close(twin(x), wanted)
    assert_same_state(twin.state_dict(), state)


def test_casts_and_splitting_after_them(backend, x):
    block, plain = fused(Attention(bias=True)), Attention(bias=True)
    block(x)
    block.to(torch.bfloat16)
    assert block.qkv_joined.dtype == torch.bfloat16
    assert block.state_dict()["q.scales"].dtype == torch.float16
    y = block(x.bfloat16())
    assert y.dtype == torch.bfloat16
    parts = block.qkv_joined.split()
    assert {part.dtype for part in parts} == {torch.bfloat16}
    torch.testing.assert_close(parts[1](x.bfloat16()), plain.to(torch.bfloat16).k(x.bfloat16()))


def test_gradients_reach_the_input(x):
    block, plain = fused(Attention(bias=True)), Attention(bias=True)
    grads = []
    for model in (block, plain):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    parts = torch.cat([getattr(plain, name).bias.grad for name in NAMES])
    torch.testing.assert_close(block.qkv_joined.bias.grad, parts)


@pytest.mark.parametrize("backend_name", ["eager", "aot_eager"])
def test_compiled_in_one_graph(x, backend_name):
    block, plain = fused(Attention()), Attention()
    block(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=backend_name)(x), plain(x))
    assert block.qkv_joined._held is None


REFUSED = {
    "k is not quantized": {"k": nn.Linear(K, 64)},
    "k is a Identity": {"k": nn.Identity()},
    "its projections differ in in_features: q 128, k 256": {"k": linear(64, k=256)},
    "its projections differ in group size: q 64, k 32": {"k": linear(64, g=32)},
    "its projections differ in layout: q gemm, k gemv": {"k": linear(64, layout="gemv")},
    "its projections differ in zero_point: q True, k False": {"k": linear(64, zero_point=False)},
    "its projections differ in bias: q none, k torch.float32": {"k": linear(64, bias=True)},
    "its projections differ in dtype: q torch.float32, k torch.float16": {"k": linear(64, dtype=torch.float16)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_joined(reason):
    assert refuses({"q": linear(64), **REFUSED[reason]}) == reason


def test_scales_of_other_dtypes_are_not_joined():
    parts = {"q": linear(64), "k": AwqLinear(K, 64, G, scales_dtype=torch.bfloat16, dtype=torch.float32)}
    assert refuses(parts) == "its projections differ in dtype of the scales: q torch.float16, k torch.bfloat16"
    assert refuses({"q": linear(64), "k": linear(32)}) is None


def test_names(x):
    block = fused(Attention())
    assert GATE_UP != "qkv_joined"
    assert isinstance(block.q, JoinedPart)
    assert "part 0 of a joined linear" in repr(block)


def test_saving_restores_once(toy, x, monkeypatch):
    block = fused(Attention())
    block(x)
    joined = block.qkv_joined
    restores = []
    restore = joined.weight_state.plan.resident.restore
    counted = replace(joined.weight_state.plan.resident, restore=lambda *a: restores.append(1) or restore(*a))
    monkeypatch.setattr(joined.weight_state, "plan", replace(joined.weight_state.plan, resident=counted))
    first = block.state_dict()
    assert len(restores) == 1
    assert joined._restored is None
    assert_same_state(block.state_dict(), first)
    assert len(restores) == 2
    block.q.state_dict()
    assert len(restores) == 3
    joined.bind()  # whatever was held is of another weight now
    assert_same_state(block.state_dict(), first)
