"""What the GEMM backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

import math
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

PLUGIN_API = 1

LAYOUTS = frozenset({"gemm", "gemv", "marlin"})  # those with integer zero points
NVIDIA = frozenset({"sm80", "sm86", "sm89", "sm90", "sm100", "sm120"})
MOST_TILED = 256  # rows up to which unpacking in the tiles beats a dense weight made for the call (H100)


def _nbytes(spec: LinearSpec) -> int:
    words = math.ceil(spec.in_features / 128) * 16 * spec.out_features
    return (4 * words + 3 * spec.groups * spec.out_features) * max(1, spec.experts)


def _probe(device: Device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


PLANES = ResidentLayout(
    "awq_planes",
    lazy("awq_gemm.layout:prepare"),
    lazy("awq_gemm.layout:restore"),
    lazy("awq_gemm.layout:dequantize"),
    _nbytes,
    "repacked for the GPU kernels, decoding and prefill share it",
)


def _record(rows: Rows, priority: int) -> Capability:
    return Capability(
        device="cuda",
        vendors=frozenset({"nvidia"}),
        archs=NVIDIA,
        layouts=LAYOUTS,
        dtypes=frozenset({"float16", "bfloat16"}),
        group_multiple=16,
        out_multiple=8,
        rows=rows,
        priority=priority,
        tested=frozenset({"sm90"}),
    )


def _signature(dtype: str) -> dict[str, str]:
    x = {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[dtype]
    return {"x_ptr": x, "planes_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": "*u8:16", "y_ptr": x}


def _matmul_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .tiles import LARGEST, TILES

    more = {"parts_ptr": "*fp32:16", "counters_ptr": "*i32:16", "K": "i32", "N": "i32", "M": "i32", "G": "i32"}
    return [
        TritonSource(
            kernels.matmul,
            _signature(spec.dtype) | more,
            {
                "GP": spec.group_size // 16,
                "MT": tile.m,
                "NT": tile.n,
                "SPLIT": 4,
                "STAGES": tile.stages,
                "SCALE_LATE": tile.scale_late,
                "EVEN": True,
                "PTX": spec.device.vendor == "nvidia",
                "WIDE": False,
            },
            {"num_warps": tile.warps},
        )
        for tile in (*(tile for _, tile in TILES), LARGEST)
    ]


def _dequantize_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels

    signature = {k: v for k, v in _signature(spec.dtype).items() if k not in ("x_ptr", "y_ptr")}
    signature |= {"out_ptr": _signature(spec.dtype)["y_ptr"], "K": "i32", "N": "i32", "G": "i32"}
    constants = {"GP": spec.group_size // 16, "NT": 128, "PTX": spec.device.vendor == "nvidia"}
    return [TritonSource(kernels.dequantize, signature, constants, {"num_warps": 4})]


BACKEND = Backend(
    name="gemm",
    layouts=(PLANES,),
    kernels=(
        Kernel(
            name="tiles",
            reads=PLANES.name,
            capabilities=(_record(Rows(1, MOST_TILED), 220), _record(Rows(MOST_TILED + 1), 205)),
            apply=lazy("awq_gemm.launch:matmul"),
            sources=_matmul_sources,
        ),
        Kernel(
            name="dequantize",
            reads=PLANES.name,
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
