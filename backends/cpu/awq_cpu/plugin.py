"""What the CPU backend declares. Importing this imports no torch; the arithmetic is loaded at the first use.

Where the bands of M meet was measured (README.md): PyTorch's int4 kernel is the fastest for few rows, the unpacking
matmul for many; each still serves the other's rows, with a lower priority, for when the other is disabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from awq_core.api import Backend, Capability, Kernel, ResidentLayout, Rows, hookimpl, lazy

from .sizes import dense_bytes, int4pack_bytes

PLUGIN_API = 1

LAYOUTS = frozenset({"gemm", "gemv", "gemv_fast", "llm_awq", "marlin"})
FEW_ROWS = 80  # the most rows for which PyTorch's int4 kernel is the faster one


def _layout(name: str, module: str, nbytes: Callable[..., int], note: str) -> ResidentLayout:
    prepare, restore, dequantize = (lazy(f"awq_cpu.{module}:{f}") for f in ("prepare", "restore", "dequantize"))
    return ResidentLayout(name, prepare, restore, dequantize, nbytes, note)


INT4PACK = _layout("cpu_int4pack", "int4pack", int4pack_bytes, "packed for PyTorch's int4 kernel, no dense copy")
DENSE = _layout(
    "cpu_dense",
    "dense",
    dense_bytes,
    "dense copy beside the checkpoint tensors: 4.5 bytes a weight in float32, 2.5 in float16, instead of 0.56, because "
    "PyTorch's int4 kernel is fast for bfloat16 only",
)


def _int4(rows: Rows, priority: int) -> Capability:
    return Capability(
        device="cpu",
        archs=frozenset({"avx2", "avx512"}),  # elsewhere PyTorch's int4 kernel is a scalar loop
        layouts=LAYOUTS,
        dtypes=frozenset({"bfloat16"}),
        group_multiple=32,
        in_multiple=32,
        out_multiple=16,
        rows=rows,
        priority=priority,
        tested=frozenset({"avx2", "avx512"}),
    )


FEW, MANY = Rows(1, FEW_ROWS), Rows(FEW_ROWS + 1)

BACKEND = Backend(
    name="cpu",
    layouts=(INT4PACK, DENSE),
    kernels=(
        Kernel(
            name="int4pack",
            reads=INT4PACK.name,
            capabilities=(_int4(FEW, 220), _int4(MANY, 205)),
            apply=lazy("awq_cpu.int4pack:apply"),
        ),
        Kernel(
            name="unpack_matmul",
            reads=INT4PACK.name,
            capabilities=(_int4(MANY, 220), _int4(FEW, 205)),
            apply=lazy("awq_cpu.prefill:apply"),
        ),
        Kernel(
            name="dense",
            reads=DENSE.name,
            capabilities=(
                Capability(
                    device="cpu",
                    layouts=LAYOUTS,
                    dtypes=frozenset({"float32", "float16", "bfloat16"}),
                    priority=150,
                    tested=frozenset({"avx2", "avx512"}),
                ),
            ),
            apply=lazy("awq_cpu.dense:apply"),
            adds_bias=True,
        ),
    ),
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``cpu``."""
    return (BACKEND,)
