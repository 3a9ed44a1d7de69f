"""What the GEMM backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from awq_core.api import (
    Backend,
    Capability,
    Device,
    Kernel,
    LinearSpec,
    ResidentLayout,
    Rows,
    TritonSource,
    hookimpl,
    lazy,
)
from awq_core.fragments import chunk

PLUGIN_API = 1

LAYOUTS = frozenset({"gemm", "gemv", "marlin"})  # those with integer zero points
NVIDIA = frozenset({"sm80", "sm86", "sm89", "sm90", "sm100", "sm120"})
FEWEST_HOPPER = 65  # rows from which the kernel for Hopper is tried; it leaves the smallest problems to `tiles`
MOST_TILED = 384  # rows up to which unpacking in the tiles beats a dense weight made for the call (H200)


def _probe(device: Device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


FRAGMENTS = ResidentLayout(
    "awq_fragments",
    lazy("awq_core.fragments.layout:prepare"),
    lazy("awq_core.fragments.layout:restore"),
    lazy("awq_gemm.launch:dequantize"),
    lazy("awq_core.fragments.layout:nbytes"),
    "in the order of the tensor cores; decoding and prefill share it",
)


def _record(rows: Rows, priority: int, archs: frozenset[str] = NVIDIA, group_multiple: int = 16) -> Capability:
    return Capability(
        device="cuda",
        vendors=frozenset({"nvidia"}),
        archs=archs,
        layouts=LAYOUTS,
        dtypes=frozenset({"float16", "bfloat16"}),
        group_multiple=group_multiple,
        out_multiple=8,
        rows=rows,
        priority=priority,
        tested=frozenset({"sm90"}),
    )


def _signature(dtype: str) -> dict[str, str]:
    kind = {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[dtype]
    weight = {"words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": "*i32:16"}
    return weight | {"out": kind, "K": "i32", "N": "i32", "G": "i32"}


def _matmul_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .tiles import tiles

    signature = _signature(spec.dtype)
    kind = signature.pop("out")
    signature |= {"x_ptr": kind, "y_ptr": kind, "parts_ptr": "*fp32:16", "counters_ptr": "*i32:16", "M": "i32"}
    return [
        TritonSource(
            kernels.matmul,
            signature,
            {
                "GP": spec.group_size // 16,
                "CH": chunk(spec.group_size),
                "NT": tile.n,
                "MT": tile.m,
                "SPLIT": 1 if tile.fill == 1 else 4,
                "STAGES": tile.stages,
                "EVEN": spec.in_features % 128 == 0,
                "FULL": spec.out_features % tile.n == 0,
                "JOIN": spec.device.arch == "sm90",
                "PTX": True,
                "WIDE": False,
            },
            {"num_warps": tile.warps},
        )
        for tile in sorted(
            tiles(spec.device.arch == "sm90" and spec.group_size % 128 == 0),
            key=lambda tile: (tile.m, tile.n, tile.fill),
        )
    ]


def _dequantize_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels

    signature = _signature(spec.dtype)
    signature["out_ptr"] = signature.pop("out")
    constants = {"GP": spec.group_size // 16, "CH": chunk(spec.group_size), "NT": 64, "PTX": True}
    return [TritonSource(kernels.dequantize, signature, constants, {"num_warps": 4})]


def _hopper_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    if spec.device.arch != "sm90" or spec.group_size % 128:
        return []
    from . import hopper
    from .hopper_launch import TYPES, shared_layout
    from .hopper_tiles import WAYS

    kind, dtype = next((str(g), t) for t, g in TYPES.items() if spec.dtype == str(t).removeprefix("torch."))
    signature = {"words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": "*i32:16", "parts_ptr": "*fp32:16"}
    signature |= {"counters_ptr": "*i32:16", "K": "i32", "N": "i32", "M": "i32", "shared": "i32"}

    def tile(rows: int, columns: int) -> str:
        return f"tensordesc<{kind}[{rows}, {columns}],{shared_layout(rows, columns, dtype)!r}>"

    return [
        TritonSource(
            hopper.product,
            {"x_desc": tile(way.m, 16 * way.planes), "y_desc": tile(way.m, way.n)} | signature,
            {
                "GP": spec.group_size // 16,
                "NT": way.n,
                "MT": way.m,
                "P": way.planes,
                "SHARED": shared,
                "STAGES": way.stages,
            },
            {"num_warps": way.warps},
        )
        for way in WAYS
        for shared in (False, True)
    ]


BACKEND = Backend(
    name="gemm",
    layouts=(FRAGMENTS,),
    kernels=(
        Kernel(
            name="tiles",
            reads=FRAGMENTS.name,
            capabilities=(_record(Rows(1, MOST_TILED), 220), _record(Rows(MOST_TILED + 1), 205)),
            apply=lazy("awq_gemm.launch:matmul"),
            sources=_matmul_sources,
            tunables=lazy("awq_gemm.tiles:candidates"),
        ),
        Kernel(
            name="hopper",
            reads=FRAGMENTS.name,
            capabilities=(_record(Rows(FEWEST_HOPPER), 240, frozenset({"sm90"}), 128),),
            apply=lazy("awq_gemm.hopper_launch:product"),
            sources=_hopper_sources,
        ),
        Kernel(
            name="dequantize",
            reads=FRAGMENTS.name,
            capabilities=(_record(Rows(MOST_TILED + 1), 220), _record(Rows(1, MOST_TILED), 200)),
            apply=lazy("awq_gemm.launch:dequantize_matmul"),
            sources=_dequantize_sources,
        ),
    ),
    probe=_probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``gemm``."""
    return (BACKEND,)
