"""The launchers of the NVIDIA kernels without a GPU: every argument in its place, constants by name, kernels kept.

Triton's functions are replaced by ones that note how they are called.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from awq_core.api import Device, LinearSpec, Normed, Weight
from awq_core.fragments.launch import counters, own_counters
from awq_core.layouts import checkpoint_layout
from awq_core.plugins import registry
from awq_core.testing.data import random_codes
from awq_gemm import hopper_launch
from awq_gemm import launch as gemm
from awq_gemv import launch as gemv

OPTIONS = {"num_warps", "launch_pdl", "maxnreg"}
SPEC = LinearSpec(1024, 1536, 128, device=Device("cuda", "nvidia", "sm90"))


class Noting:
    """In place of a ``triton.jit`` function."""

    def __init__(self, function, calls: list[tuple[str, str]]) -> None:
        self.name, self.arg_names, self.calls = function.__name__, function.arg_names, calls

    def __getitem__(self, grid):
        assert len(grid) == 3
        assert all(size >= 1 for size in grid)

        def launch(*args, **named):
            constants = self.arg_names[len(args) :]
            assert set(named) - OPTIONS == set(constants)
            for name, arg in zip(self.arg_names, args, strict=False):
                assert name.endswith("_ptr") == isinstance(arg, torch.Tensor), name
            self.calls.append((self.name, "compiles"))
            return {grid: lambda *again: self.calls.append((self.name, "again"))}

        return launch


@pytest.fixture
def calls(monkeypatch):
    """The calls of kernels, on a GPU that is not there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found: list[tuple[str, str]] = []
    for module, name in (
        (hopper_launch.hopper, "product"),
        (gemm.kernels, "matmul"),
        (gemv.kernels, "few"),
        (gemv.one_kernel, "one"),
    ):
        monkeypatch.setattr(module, name, Noting(getattr(module, name), found))
    for module in (hopper_launch, gemm, gemv):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132, raising=False)
    monkeypatch.setattr(hopper_launch, "enter", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(hopper_launch, "_compiled", set())
    kept = (hopper_launch._product, gemm._matmul, gemv._few, gemv._one)
    for function in kept:
        function.cache_clear()
    yield found
    for function in kept:
        function.cache_clear()


@pytest.fixture(scope="module")
def weight():
    layout = registry().backend("gemm").layouts[0]
    codes = random_codes(SPEC, torch.Generator().manual_seed(0))
    return Weight(SPEC, layout, layout.prepare(SPEC, checkpoint_layout("gemm").pack(codes)))


def row(m: int = 1, n: int = 1024) -> torch.Tensor:
    return torch.zeros(m, n, dtype=torch.float16)


def test_one_row(calls, weight):
    assert gemv.one(weight, row(), None).shape == (1, 1536)
    gemv.one(weight, row(), None)
    gemv.one(weight, row(), row(1, 1536)[0])
    assert gemv.one_silu_mul(weight, row()).shape == (1, 768)
    gemv.one_add(weight, row(), row(1, 1536))
    normed = Normed(row(), row(), row()[0], 1e-5, False, row())
    gemv.one_norm(weight, normed, None)
    assert gemv.one_norm_silu_mul(weight, normed).shape == (1, 768)
    assert calls == [("one", kind) for kind in ("compiles", "again", *["compiles"] * 5)]


def test_few_rows(calls, weight):
    for m in (2, 2, 16):
        assert gemv.few(weight, row(m), None).shape == (m, 1536)
    assert calls == [("few", "compiles"), ("few", "again"), ("few", "compiles")]


def test_many_rows_compile_every_form_first(calls, weight):
    assert hopper_launch.product(weight, row(700), None).shape == (700, 1536)
    first = [name for name, _ in calls]
    assert first.count("product") == 2 * len(hopper_launch.WAYS) + 1
    calls.clear()
    hopper_launch.product(weight, row(700), None)
    assert calls == [("product", "again")]


def test_captures_can_have_counters_of_their_own(monkeypatch):
    device = SimpleNamespace(type="cuda", index=0)
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **_: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with own_counters(device) as first:
        assert counters(device) is first
        assert counters(SimpleNamespace(type="cuda", index=1)) is not first
    with own_counters(device) as second:
        assert counters(device) is second is not first
    shared = counters(device)
    assert shared is not first
    assert shared is not second
