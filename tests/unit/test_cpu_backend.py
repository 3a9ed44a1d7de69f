import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from awq_core.api import Codes, Device, LinearSpec, Weight, checkpoint_layout, dequantize
from awq_core.capability import check
from awq_cpu import dense as dense_module
from awq_cpu import int4pack, isa, packing, prefill
from awq_cpu.plugin import BACKEND, FEW_ROWS
from awq_cpu.scratch import scratch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = {kernel.name: kernel for kernel in BACKEND.kernels}
INT4PACK, DENSE = BACKEND.layouts
SHAPES = [  # (N, K, g): whole blocks, tails of 16, 32 and 48 rows, groups that are split for PyTorch's kernel
    (16, 32, 32),
    (48, 192, 64),
    (64, 96, 96),
    (80, 256, 128),
    (96, 512, 256),
    (112, 384, 192),
    (192, 576, 64),
    (208, 128, 32),
    (320, 1152, 1152),
]
SCALED = ("gemv_fast", "llm_awq")


def spec_of(n: int, k: int, g: int, layout: str = "gemm", dtype: str = "bfloat16", experts: int = 0) -> LinearSpec:
    arch = "avx2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "avx512"
    device = Device("cpu", "any", arch)
    return LinearSpec(k, n, g, layout, layout != "marlin", dtype=dtype, device=device, experts=experts)


def codes_of(spec: LinearSpec, seed: int = 0) -> Codes:
    """Random codes; the first columns have the zero points 0 and 15, where the layout has any."""
    generator = torch.Generator().manual_seed(seed)
    k, n, groups = spec.in_features, spec.out_features, spec.groups
    codes = torch.randint(0, 16, (k, n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (groups, n), generator=generator, dtype=torch.uint8)
    zeros[:, 0], zeros[:, 1] = 0, 15
    if not spec.zero_point:
        zeros.fill_(8)
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.002).to(torch.float16)
    return Codes(codes, zeros, scales)


def checkpoint_of(spec: LinearSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    pack = checkpoint_layout(spec.layout).pack
    if not spec.experts:
        return pack(codes_of(spec, seed))
    stored = [pack(codes_of(replace(spec, experts=0), seed + e)) for e in range(spec.experts)]
    return {name: torch.stack([s[name] for s in stored]) for name in stored[0]}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def total_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.to(torch.float32) - reference).norm() / reference.norm())


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 32, 48, 64, 80, 96, 112, 128, 192, 208])
@pytest.mark.parametrize("k", [32, 96, 576])
def test_exact_packing_equals_pytorch(n: int, k: int) -> None:
    spec = spec_of(n, k, 32)
    codes = codes_of(spec).codes
    wanted = packing.CONVERT(codes.t().to(torch.int32).contiguous(), 1)
    words = checkpoint_of(spec)["qweight"]
    assert packing.block_rows() in packing.BLOCKS
    assert torch.equal(packing.gemm_columns(words), codes)
    assert torch.equal(packing.pack_gemm_words(words), wanted)
    assert torch.equal(packing.pack_codes(codes), wanted)
    assert torch.equal(packing.unpack_codes(wanted), codes)


def test_exact_packing_in_chunks_and_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_WORDS", 50)
    words = torch.randint(-(2**31), 2**31, (67 * 32 + 1, 208 // 8 + 3), dtype=torch.int32)[1:, 3:]
    wanted = packing.CONVERT(packing.gemm_columns(words).t().to(torch.int32).contiguous(), 1)
    assert torch.equal(packing.pack_gemm_words(words), wanted)


@pytest.mark.parametrize("block", packing.BLOCKS)
@pytest.mark.parametrize("n", [32, 64, 112, 320])
def test_exact_packing_of_words_for_either_instruction_set(monkeypatch: pytest.MonkeyPatch, block: int, n: int) -> None:
    """Bit tricks on words and plain packing of codes agree for the block that this machine does not use, too."""
    monkeypatch.setattr(packing, "block_rows", lambda: block)
    words = torch.randint(-(2**31), 2**31, (96, n // 8), dtype=torch.int32)
    assert torch.equal(packing.pack_gemm_words(words), packing.pack_codes(packing.gemm_columns(words)))


def test_every_zero_point_follows_from_float16_scales() -> None:
    """Of all float16 numbers those that may stand in a weight whose zero points are not kept, with every zero point."""
    bits = torch.cat((torch.arange(1, 0x7C00), torch.arange(1, 0x7C00) - 2**15)).to(torch.int16)
    scales = bits.view(torch.float16).expand(16, -1)
    zeros = torch.arange(16, dtype=torch.uint8).unsqueeze(1).expand(scales.shape)
    assert int4pack._zeros_follow(scales)
    spec = spec_of(scales.shape[1], 16 * 32, 32)
    pairs = int4pack._pairs(spec, Codes(zeros[:0], zeros, scales))
    assert torch.equal(int4pack._zeros(spec, scales, pairs), zeros)
    for other in (0.0, -0.0, float("inf"), -float("inf"), float("nan")):
        assert not int4pack._zeros_follow(torch.tensor([[1.0, other]], dtype=torch.float16))
    assert not int4pack._zeros_follow(torch.ones(1, 1, dtype=torch.bfloat16))


def test_exact_without_a_known_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packing, prefill):
        monkeypatch.setattr(module, "block_rows", lambda: None)
    spec = spec_of(112, 288, 96)
    stored = checkpoint_of(spec)
    resident = INT4PACK.prepare(spec, stored)
    assert same(INT4PACK.restore(spec, resident), stored)
    x = torch.randn(3, 288).to(torch.bfloat16)
    weight = Weight(spec, INT4PACK, resident)
    assert torch.equal(prefill.apply(weight, x, None), int4pack.apply(weight, x, None))


# --- resident layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["int4pack", "dense"])
def test_exact_restore_from_gemm(shape: tuple[int, int, int], layout: str) -> None:
    spec = spec_of(*shape, dtype="bfloat16" if layout == "int4pack" else "float16")
    resident = INT4PACK if layout == "int4pack" else DENSE
    stored = checkpoint_of(spec)
    before = {name: t.clone() for name, t in stored.items()}
    tensors = resident.prepare(spec, stored)
    assert same(stored, before)
    assert same(resident.restore(spec, tensors), stored)
    assert resident.nbytes(spec) == total_bytes(tensors)
    assert torch.equal(resident.dequantize(spec, tensors, torch.float32), dequantize(codes_of(spec), torch.float32))


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast", "llm_awq", "marlin"])
@pytest.mark.parametrize("resident", [INT4PACK, DENSE])
def test_exact_restore_from_other_layouts(layout: str, resident) -> None:
    shape = (256, 256, 128) if layout == "marlin" else (80, 192, 64)
    spec = spec_of(*shape, layout=layout)
    stored = checkpoint_of(spec)
    before = {name: t.clone() for name, t in stored.items()}
    tensors = resident.prepare(spec, stored)
    assert same(stored, before)
    assert same(resident.restore(spec, tensors), stored)
    assert resident.nbytes(spec) == total_bytes(tensors)
    truth = dequantize(checkpoint_layout(layout).unpack(stored, *_kng(spec)), torch.float32)
    assert torch.equal(resident.dequantize(spec, tensors, torch.float32), truth)


def _kng(spec: LinearSpec) -> tuple[int, int, int]:
    return spec.in_features, spec.out_features, spec.group_size


def test_zero_scales_keep_the_zero_points() -> None:
    spec = spec_of(48, 96, 32)
    stored = checkpoint_of(spec)
    stored["scales"][1, 5:9] = 0.0
    tensors = INT4PACK.prepare(spec, stored)
    assert "zeros" in tensors
    assert same(INT4PACK.restore(spec, tensors), stored)
    weight = INT4PACK.dequantize(spec, tensors, torch.float32)
    assert not weight[32:64, 5:9].any()
    y = int4pack.apply(Weight(spec, INT4PACK, tensors), torch.ones(1, 96, dtype=torch.bfloat16), None)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    spec = spec_of(48, 96, 32)
    codes = codes_of(spec)
    stored = checkpoint_layout("gemm").pack(replace(codes, scales=codes.scales.to(dtype)))
    assert same(INT4PACK.restore(spec, INT4PACK.prepare(spec, stored)), stored)


@pytest.mark.parametrize("layout", SCALED)
def test_scaled_zeros_that_are_no_multiples_are_kept(layout: str) -> None:
    spec = spec_of(80, 192, 64, layout=layout)
    name = "qzeros" if layout == "gemv_fast" else "scaled_zeros"
    stored = checkpoint_of(spec)
    assert INT4PACK.prepare(spec, stored).keys() == {"packed", "scale_and_zero", "scales"}
    stored[name][0, 3] *= 1.25
    stored[name][1, 0] = 0.0  # the usual one is -0.0
    tensors = INT4PACK.prepare(spec, stored)
    assert "scaled_zeros" in tensors
    assert same(INT4PACK.restore(spec, tensors), stored)
    truth = dequantize(checkpoint_layout(layout).unpack(stored, *_kng(spec)), torch.float32)
    assert torch.equal(INT4PACK.dequantize(spec, tensors, torch.float32), truth)
    x = torch.randn(4, 192).to(torch.bfloat16)
    for name in ("int4pack", "unpack_matmul"):
        y = KERNELS[name].apply(Weight(spec, INT4PACK, tensors), x, None)
        assert error(y, x.to(torch.float32) @ truth) < 5e-3


@pytest.mark.parametrize("zero_scale", [False, True])
@pytest.mark.parametrize("resident", [INT4PACK, DENSE])
def test_experts(resident, zero_scale: bool) -> None:
    spec = spec_of(112, 128, 64, experts=3)
    stored = checkpoint_of(spec)
    if zero_scale:
        stored["scales"][1, 0, 7] = 0.0
    tensors = resident.prepare(spec, stored)
    assert same(resident.restore(spec, tensors), stored)
    assert zero_scale or resident.nbytes(spec) == total_bytes(tensors)
    one = replace(spec, experts=0)
    x = torch.randn(5, 128).to(torch.bfloat16)
    for expert in range(3):
        alone = resident.prepare(one, {name: t[expert] for name, t in stored.items()})
        slices = {name: t[expert] for name, t in tensors.items()}
        for kernel in BACKEND.kernels:
            if kernel.reads == resident.name:
                wanted = kernel.apply(Weight(one, resident, alone), x, None)
                assert torch.equal(kernel.apply(Weight(spec, resident, slices), x, None), wanted)


def test_bytes_of_int4pack_at_group_64() -> None:
    spec = spec_of(1536, 576, 64)
    assert INT4PACK.nbytes(spec) <= 0.30 * 2 * 1536 * 576


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "fast"), [("int4pack", True), ("unpack_matmul", True), ("unpack_matmul", False)])
def test_numerics_bfloat16(shape: tuple[int, int, int], name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PIECE", 1 << 15)  # so that small weights come in several pieces
    monkeypatch.setattr(prefill, "ROWS", 100)  # and many rows, too
    monkeypatch.setattr(prefill, "fast_bfloat16", lambda: fast)
    spec = spec_of(*shape)
    tensors = INT4PACK.prepare(spec, checkpoint_of(spec))
    before = {n: t.clone() for n, t in tensors.items()}
    dense = dequantize(codes_of(spec), torch.float32)
    for m in (1, 2, FEW_ROWS, FEW_ROWS + 1, 130):
        x = torch.randn(m, spec.in_features, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
        y = KERNELS[name].apply(Weight(spec, INT4PACK, tensors), x, None)
        assert y.dtype == torch.bfloat16
        assert y.shape == (m, spec.out_features)
        assert error(y, x.to(torch.float32) @ dense) < 5e-3
    assert same(tensors, before)


@pytest.mark.parametrize("fast", [True, False])
def test_numerics_exact_of_every_code(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that bfloat16 holds and one input at a time: both kernels give the weight itself, zero points 0 and 15."""
    monkeypatch.setattr(prefill, "fast_bfloat16", lambda: fast)
    spec = spec_of(80, 64, 32)
    stored = checkpoint_layout("gemm").pack(replace(codes_of(spec), scales=torch.full((2, 80), 0.5).half()))
    tensors = INT4PACK.prepare(spec, stored)
    dense = INT4PACK.dequantize(spec, tensors, torch.bfloat16)
    for name in ("int4pack", "unpack_matmul"):
        y = KERNELS[name].apply(Weight(spec, INT4PACK, tensors), torch.eye(64, dtype=torch.bfloat16), None)
        assert torch.equal(y, dense)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("shape", [(8, 48, 16), (72, 128, 64), (192, 576, 64)])
@pytest.mark.parametrize("fast", [True, False])
def test_numerics_dense(
    dtype: str, limit: float, shape: tuple[int, int, int], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_module, "fast_bfloat16", lambda: fast)
    spec = spec_of(*shape, dtype=dtype)
    stored = checkpoint_of(spec)
    tensors = DENSE.prepare(spec, stored)
    dense = dequantize(codes_of(spec), torch.float32)
    bias = torch.randn(spec.out_features)
    for m in (1, 3, 40):
        x = torch.randn(m, spec.in_features).to(DTYPES[dtype])
        weight = Weight(spec, DENSE, tensors)
        assert error(KERNELS["dense"].apply(weight, x, None), x.to(torch.float32) @ dense) < limit
        with_bias = KERNELS["dense"].apply(weight, x, bias.to(DTYPES[dtype]))
        assert error(with_bias, x.to(torch.float32) @ dense + bias) < limit
    assert torch.equal(tensors["dense"], dense.t().to(DTYPES[dtype]))


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
        (None, True),  # a PyTorch that does not tell
    ],
)
def test_which_processors_multiply_bfloat16(
    capabilities: dict[str, object] | None, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = None if capabilities is None else lambda: capabilities
    monkeypatch.setattr(torch.cpu, "get_capabilities", tell, raising=False)
    assert isa.fast_bfloat16.__wrapped__() is fast


def test_two_threads_do_not_share_buffers() -> None:
    specs = [spec_of(192, 576, 64), spec_of(208, 576, 192)]
    weights = [Weight(s, INT4PACK, INT4PACK.prepare(s, checkpoint_of(s, i))) for i, s in enumerate(specs)]
    x = torch.randn(FEW_ROWS + 1, 576).to(torch.bfloat16)
    wanted = [prefill.apply(w, x, None) for w in weights]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(prefill.apply(weights[i], x, None), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_buffers_of_inference_mode_serve_afterwards() -> None:
    spec = spec_of(80, 128, 64)
    x = torch.randn(4, 128).to(torch.bfloat16)
    found: list[torch.Tensor] = []

    def work() -> None:  # a new thread has no buffers yet
        with torch.inference_mode():
            weight = Weight(spec, INT4PACK, INT4PACK.prepare(spec, checkpoint_of(spec)))
            found.append(prefill.apply(weight, x, None))
        assert not scratch("weight", (1,), torch.float32).is_inference()
        with torch.no_grad():
            found.append(prefill.apply(weight, x, None))
        found.append(prefill.apply(weight, x, None))
        found.append(int4pack.apply(weight, x, None))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 4
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert error(found[3], found[0].to(torch.float32)) < 1e-2


# --- declarations ----------------------------------------------------------------------------------------------------


def taken(spec: LinearSpec, m: int) -> list[str]:
    """The kernels that take the problem, best first."""
    best = {
        kernel.name: max((c.priority for c in kernel.capabilities if not check(c, spec, m)), default=None)
        for kernel in BACKEND.kernels
    }
    return sorted((name for name, p in best.items() if p is not None), key=lambda name: -(best[name] or 0))


def test_bands_of_rows() -> None:
    spec = spec_of(192, 576, 64)
    assert taken(spec, 1) == taken(spec, FEW_ROWS) == ["int4pack", "unpack_matmul", "dense"]
    assert taken(spec, FEW_ROWS + 1) == taken(spec, 4096) == ["unpack_matmul", "int4pack", "dense"]


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 16},
        {"group_size": 48, "in_features": 96},
        {"out_features": 72},
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"device": Device("cpu", "any", "generic")},
    ],
)
def test_what_the_int4_kernel_refuses_goes_dense(change: dict[str, object]) -> None:
    spec = replace(spec_of(192, 576, 64), **change)
    assert taken(spec, 1) == taken(spec, 500) == ["dense"]


def test_pytorch_refuses_what_is_not_declared() -> None:
    x, pairs = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(4, 16, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="qGroupSize"):
        packing.MATMUL(x, torch.zeros(16, 32, dtype=torch.uint8), 16, pairs)
    with pytest.raises(RuntimeError, match=r"multiple|divisible|16"):
        packing.CONVERT(torch.zeros(72, 64, dtype=torch.int32), 1)


def test_other_devices_are_refused() -> None:
    assert taken(replace(spec_of(192, 576, 64), device=Device("cuda", "nvidia", "sm90")), 1) == []


def test_importing_the_plugin_imports_no_torch() -> None:
    code = "import sys, awq_cpu.plugin; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="runs as avx2 already, or cannot")
def test_avx2_packs_and_computes_alike() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider", "-k", "exact or numerics"]
    done = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
