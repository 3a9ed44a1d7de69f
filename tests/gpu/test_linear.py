"""AwqLinear on a GPU: every plan boundary, streams, graphs, Inductor, and the linears' epilogues."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from torch.nn import functional

from awq_core.api import Normed, Weight
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.linear import AwqLinear
from awq_core.spec import LinearSpec
from awq_core.testing.data import random_codes

LIMIT = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = ((1024, 1536, 128), (4096, 1024, 128), (896, 896, 64), (384, 200, 32), (208, 72, 16))


def made(k: int, n: int, group: int, dtype: torch.dtype = torch.float16, bias: bool = False, seed: int = 0):
    """A bound linear on the GPU and its exact weight [K, N] in float64."""
    codes = random_codes(LinearSpec(k, n, group), torch.Generator().manual_seed(seed))
    linear = AwqLinear(k, n, group, bias=bias, dtype=dtype)
    stored = checkpoint_layout("gemm").pack(codes)
    if bias:
        stored["bias"] = torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    linear.load_state_dict(stored)
    linear = linear.cuda().requires_grad_(False)
    linear.bind()
    return linear, dequantize(codes, torch.float32).double().cuda()


def drawn(m: int, k: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def boundaries(linear: AwqLinear) -> list[int]:
    """M at, before and after the ends of the plan's bands, and some beyond."""
    plan = linear.weight_state.plan
    assert plan is not None
    ends = [band.rows.last for band in plan.bands if band.rows.last is not None]
    return sorted({m for end in [1, 8, *ends, 128, 256, 512, 1024] for m in (end - 1, end, end + 1) if m})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("k", "n", "group"), SHAPES)
def test_every_plan_boundary(k: int, n: int, group: int, dtype: torch.dtype) -> None:
    for bias in (False, True):
        linear, exact = made(k, n, group, dtype, bias)
        for m in boundaries(linear):
            x = drawn(m, k, dtype, m)
            wanted = x.double() @ exact + (linear.bias.double() if bias else 0)
            poison = torch.full((32 << 20,), float("nan"), device="cuda")
            del poison
            y = linear(x)
            assert error(y, wanted) < LIMIT[dtype], (m, bias, error(y, wanted))
            assert torch.equal(linear(x), y), f"two runs differ at M={m}"


def test_streams_do_not_disturb_each_other() -> None:
    linears = [made(1024, 1536, 128, seed=i)[0] for i in range(2)]
    for m in (1, 4, 16, 48, 200):
        x = drawn(m, 1024)
        alone = [linear(x) for linear in linears]
        streams = [torch.cuda.Stream() for _ in linears]
        torch.cuda.synchronize()
        got: list[list[torch.Tensor]] = [[], []]
        for _ in range(50):
            for stream, linear, found in zip(streams, linears, got, strict=True):
                with torch.cuda.stream(stream):
                    found.append(linear(x))
        torch.cuda.synchronize()
        for wanted, found in zip(alone, got, strict=True):
            assert all(torch.equal(wanted, y) for y in found), m


def test_threads_of_their_own() -> None:
    linear, exact = made(1024, 1536, 128)
    results: dict[int, torch.Tensor] = {}

    def work(m: int) -> None:
        results[m] = linear(drawn(m, 1024))

    for m in (1, 64, 300):  # threads that have no CUDA context yet
        thread = threading.Thread(target=work, args=(m,))
        thread.start()
        thread.join()
        assert error(results[m], drawn(m, 1024).double() @ exact) < LIMIT[torch.float16]


def test_graph_capture_gives_the_same_bits() -> None:
    linear, _ = made(1024, 1536, 128)
    for m in (1, 16, 17, 64, 65, 300):
        x = drawn(m, 1024)
        eager = linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        for seed in range(3):
            new = drawn(m, 1024, seed=seed)
            x.copy_(new)
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, linear(new)), (m, seed)
            if seed == 0:
                assert torch.equal(y, eager)


def test_capture_right_after_binding() -> None:
    """Binding has compiled every kernel that a linear with a bias launches: under a capture nothing may compile."""
    linear, exact = made(768, 1280, 64, bias=True)
    xs = {m: drawn(m, 768) for m in (1, 16, 40, 300)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = {m: linear(x) for m, x in xs.items()}
    graph.replay()
    for m, x in xs.items():
        assert error(ys[m], x.double() @ exact + linear.bias.double()) < LIMIT[torch.float16], m


def test_inductor_compiles_it_whole() -> None:
    first, _ = made(1024, 1536, 128, bias=True)
    second, _ = made(1536, 1024, 128, seed=1)

    def block(x: torch.Tensor) -> torch.Tensor:
        return second(functional.silu(first(x))) + x

    compiled = torch.compile(block, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
        for m in (1, 5, 17, 300):
            x = drawn(m, 1024)
            assert error(compiled(x), block(x).double()) < 1e-3, m


def test_longer_prompts_compile_nothing() -> None:
    from awq_gemm import hopper, kernels

    def compiled() -> list[int]:
        device = torch.cuda.current_device()
        return [len(function.device_caches[device][0]) for function in (hopper.product, kernels.matmul)]

    for k, n in ((1024, 1536), (4096, 6144)):
        linear, _ = made(k, n, 128)
        before = compiled()
        for m in (65, 80, 100, 129, 144, 160, 200, 257, 272, 300, 350, 500, 700, 1500, 3000, 5000):
            linear(drawn(m, k))
        assert compiled() == before, (k, n)


def test_inputs_at_any_place_in_memory() -> None:
    linear, _ = made(1024, 1536, 128)
    for m in (1, 2, 8, 40, 300):
        x = drawn(m, 1024)
        whole = linear(x)
        for shift in (1, 2, 8, 0):
            moved = torch.empty(x.numel() + shift, dtype=x.dtype, device="cuda")[shift:].view_as(x).copy_(x)
            assert torch.equal(linear(moved), whole), (m, shift)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_linear_makes_its_row_from_the_residual_stream(dtype: torch.dtype) -> None:
    for k, n, group in ((1024, 1536, 128), (4096, 6144, 128), (8192, 1024, 128), (9216, 1024, 128)):
        linear, exact = made(k, n, group, dtype, bias=True)
        state = linear.weight_state
        plan = state.plan
        assert plan is not None
        weight, forms = Weight(plan.spec, plan.resident, state.tensors()), plan.kernel(1).epilogues
        x, y, w = drawn(1, k, dtype, 1), drawn(1, k, dtype, 2), drawn(1, k, dtype, 3)[0]
        for plus, offset in ((None, False), (y, False), (y, True)):
            out = torch.full_like(x, float("nan"))
            row = Normed(x, plus, w, 1e-5, offset, out)
            stream = x if plus is None else x + plus
            wide = stream.double() * torch.rsqrt(stream.double().square().mean() + 1e-5)
            exact_y = (wide * (w.double() + offset)) @ exact
            assert error(forms["norm"](weight, row, linear.bias), exact_y + linear.bias.double()) < LIMIT[dtype]
            assert plus is None or torch.equal(out, stream)
            gated = functional.silu(exact_y[:, : n // 2]) * exact_y[:, n // 2 :]
            assert error(forms["norm_silu_mul"](weight, row), gated) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_epilogues_are_the_operations_that_they_replace(dtype: torch.dtype) -> None:
    for k, n, group in ((1024, 1536, 128), (384, 224, 32), (4096, 28672, 128)):
        linear, exact = made(k, n, group, dtype)
        state = linear.weight_state
        plan = state.plan
        assert plan is not None
        weight = Weight(plan.spec, plan.resident, state.tensors())
        for m in (1, 3, 8, 16):
            kernel = plan.kernel(m)
            x, other = drawn(m, k, dtype, m), drawn(m, n, dtype, m + 1)
            y = x.double() @ exact
            gated = functional.silu(y[:, : n // 2]) * y[:, n // 2 :]
            assert error(kernel.epilogues["silu_mul"](weight, x), gated) < LIMIT[dtype], (m, n)
            assert error(kernel.epilogues["add"](weight, x, other), y + other.double()) < LIMIT[dtype], (m, n)


def test_the_dense_weight_and_back() -> None:
    for k, n, group in SHAPES:
        linear, exact = made(k, n, group)
        state = linear.weight_state
        plan = state.plan
        assert plan is not None
        dense = plan.resident.dequantize(plan.spec, state.tensors(), torch.float16)
        assert error(dense, exact) < LIMIT[torch.float16]
        codes = random_codes(LinearSpec(k, n, group), torch.Generator().manual_seed(0))
        for name, tensor in checkpoint_layout("gemm").pack(codes).items():
            assert torch.equal(linear.state_dict()[name].cpu(), tensor), name
