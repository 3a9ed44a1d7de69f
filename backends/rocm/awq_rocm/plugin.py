"""What the ROCm backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from awq_core.api import Backend, Capability, Device, Kernel, LinearSpec, Rows, TritonSource, hookimpl, lazy

from .tiles import DIES, MOST_TILED, candidates, default

PLUGIN_API = 1

READS = "awq_words"  # offered by the ExLlama backend: the same bytes suit both
LAYOUTS = frozenset({"gemm", "gemv", "gemv_fast", "llm_awq", "marlin"})
SCALED = ("gemv_fast", "llm_awq")  # these store zero points as -(scale * zero), in floating point
ARCHS = frozenset({"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"})


def _probe(device: Device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


def _record(rows: Rows, priority: int) -> Capability:
    return Capability(
        device="cuda",
        vendors=frozenset({"amd"}),
        archs=ARCHS,
        layouts=LAYOUTS,
        dtypes=frozenset({"float16", "bfloat16"}),
        group_multiple=16,
        out_multiple=8,
        rows=rows,
        priority=priority,
    )


def _signature(spec: LinearSpec, **more: str) -> dict[str, str]:
    zeros = "*fp16:16" if spec.layout in SCALED else "*u8:16"
    found = {"words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": zeros}
    return found | {"W": "i32:16", "N": "i32:16", "GW": "i32"} | more


def _x(spec: LinearSpec) -> str:
    return {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[spec.dtype]


def _combine(spec: LinearSpec) -> TritonSource:
    from . import kernels
    from .launch import COMBINED

    signature = {"parts_ptr": "*fp32:16", "y_ptr": _x(spec), "MN": "i32"}
    return TritonSource(kernels.combine, signature, {"SPLIT": 4, "SIZE": COMBINED})


def _even_and_odd(spec: LinearSpec) -> list[tuple[dict[str, str], dict[str, object]]]:
    """Signature and constants of a usual shape with sums in parts, and of one that no tile divides, in one part."""
    parts = _signature(spec, x_ptr=_x(spec), out_ptr="*fp32:16")
    whole = parts | {"out_ptr": _x(spec), "W": "i32", "N": "i32"}
    return [(parts, {"SPLIT": 4, "EVEN": True}), (whole, {"SPLIT": 1, "EVEN": False})]


def _rows_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .launch import constants, options

    tile = default(spec, 1)
    return [
        _combine(spec),
        *(TritonSource(kernels.rows, s, constants(spec, tile) | c, options(tile)) for s, c in _even_and_odd(spec)),
    ]


def _tiles_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .launch import constants, options

    sources = [_combine(spec)]
    for rows in (16, 32, 64, MOST_TILED):
        tile = default(spec, rows)
        found = constants(spec, tile) | {"MT": tile.rows, "STAGES": tile.stages, "WIDE": False}
        found |= {"XCDS": DIES.get(spec.device.arch, 1)}
        sources += [
            TritonSource(kernels.tiles, signature | {"M": "i32"}, found | more, options(tile))
            for signature, more in _even_and_odd(spec)
        ]
    return sources


def _dequantize_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels

    signature = _signature(spec, out_ptr=_x(spec))
    return [TritonSource(kernels.dequantize, signature, {"NT": 128, "R": 16}, {"num_warps": 8})]


BACKEND = Backend(
    name="rocm",
    kernels=(
        Kernel(
            name="rows",
            reads=READS,
            capabilities=(_record(Rows(1, 1), 220),),
            apply=lazy("awq_rocm.launch:rows"),
            sources=_rows_sources,
            tunables=candidates,
        ),
        Kernel(
            name="tiles",
            reads=READS,
            capabilities=(_record(Rows(2, MOST_TILED), 220),),
            apply=lazy("awq_rocm.launch:tiles"),
            sources=_tiles_sources,
            tunables=candidates,
        ),
        Kernel(
            name="dequantize",
            reads=READS,
            capabilities=(_record(Rows(MOST_TILED + 1), 220),),
            apply=lazy("awq_rocm.launch:dequantize_matmul"),
            sources=_dequantize_sources,
        ),
    ),
    probe=_probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``rocm``."""
    return (BACKEND,)
