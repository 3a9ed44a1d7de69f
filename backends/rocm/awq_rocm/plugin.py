"""What the ROCm backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from awq_core.api import Backend, Capability, Kernel, LinearSpec, Rows, TritonSource, hookimpl, lazy
from awq_core.words import AWQ_WORDS, LAYOUTS, probe, sources

from .tiles import MOST_TILED, candidates, default, dies

PLUGIN_API = 1

ARCHS = frozenset({"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"})


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


def _rows_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    return sources.rows(spec, default(spec, 1))


def _tiles_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels

    found = [sources.combine(spec)]
    for rows in (16, 32, 64, MOST_TILED):
        tile = default(spec, rows)
        found += sources.tiles(kernels.tiles, spec, tile, MT=tile.rows, XCDS=dies(spec))
    return found


BACKEND = Backend(
    name="rocm",
    kernels=(
        Kernel(
            name="rows",
            reads=AWQ_WORDS,  # offered by the ExLlama backend: the same bytes suit both
            capabilities=(_record(Rows(1, 1), 220),),
            apply=lazy("awq_rocm.launch:rows"),
            sources=_rows_sources,
            tunables=candidates,
        ),
        Kernel(
            name="tiles",
            reads=AWQ_WORDS,
            capabilities=(_record(Rows(2, MOST_TILED), 220),),
            apply=lazy("awq_rocm.launch:tiles"),
            sources=_tiles_sources,
            tunables=candidates,
        ),
        Kernel(
            name="dequantize",
            reads=AWQ_WORDS,
            capabilities=(_record(Rows(MOST_TILED + 1), 220),),
            apply=lazy("awq_core.words.launch:dequantize_matmul"),
            sources=sources.dequantize,
        ),
    ),
    probe=probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``rocm``."""
    return (BACKEND,)
