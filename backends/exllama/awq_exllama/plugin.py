"""What the ExLlama backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from awq_core.api import Backend, Capability, Kernel, LinearSpec, ResidentLayout, Rows, TritonSource, hookimpl, lazy
from awq_core.words import AWQ_WORDS, LAYOUTS, nbytes, probe, sources

from .tiles import MOST_TILED, candidates, default, padded_rows

PLUGIN_API = 1

AMPERE = frozenset({"sm80", "sm86", "sm89", "sm90", "sm100", "sm120"})  # and later
TURING = frozenset({"sm75"})  # Triton does not reach its tensor cores, and they know no bfloat16
AMD = frozenset({"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"})

WORDS = ResidentLayout(
    AWQ_WORDS,
    lazy("awq_core.words.layout:prepare"),
    lazy("awq_core.words.layout:restore"),
    lazy("awq_core.words.layout:dequantize"),
    nbytes,
    "shuffled as ExLlama-v2 does, decoding and prefill share it",
)


def _record(archs: frozenset[str], dtypes: frozenset[str], rows: Rows) -> Capability:
    return Capability(
        device="cuda",
        vendors=frozenset({"nvidia", "amd"}),
        archs=archs,
        layouts=LAYOUTS,
        dtypes=dtypes,
        group_multiple=16,
        out_multiple=8,
        rows=rows,
        priority=180,
    )


def _records(rows: Rows, on_turing: Rows | None) -> tuple[Capability, ...]:
    """Above plain torch, below the kernels that are tuned for a vendor (from 200 on)."""
    found = _record(AMPERE | AMD, frozenset({"float16", "bfloat16"}), rows)
    return (found,) if on_turing is None else (found, _record(TURING, frozenset({"float16"}), on_turing))


def _rows_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    return sources.rows(spec, default(spec, 1))


def _tiles_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .launch import late

    found = [sources.combine(spec)]
    for rows in (16, 32, 64):
        tile = default(spec, rows)
        found += sources.tiles(kernels.tiles, spec, tile, MT=padded_rows(rows), LATE=late(spec))
    return found


def _rows_tunables(spec: LinearSpec, rows: int) -> Sequence[dict[str, int]]:
    return candidates(spec, 1)


BACKEND = Backend(
    name="exllama",
    layouts=(WORDS,),
    kernels=(
        Kernel(
            name="rows",
            reads=AWQ_WORDS,
            capabilities=_records(Rows(1, 1), on_turing=Rows(1, 8)),
            apply=lazy("awq_exllama.launch:rows"),
            sources=_rows_sources,
            tunables=_rows_tunables,
        ),
        Kernel(
            name="tiles",
            reads=AWQ_WORDS,
            capabilities=_records(Rows(2, MOST_TILED), on_turing=None),
            apply=lazy("awq_exllama.launch:tiles"),
            sources=_tiles_sources,
            tunables=candidates,
        ),
        Kernel(
            name="dequantize",
            reads=AWQ_WORDS,
            capabilities=_records(Rows(MOST_TILED + 1), on_turing=Rows(9)),
            apply=lazy("awq_core.words.launch:dequantize_matmul"),
            sources=sources.dequantize,
        ),
    ),
    probe=probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``exllama``."""
    return (BACKEND,)
