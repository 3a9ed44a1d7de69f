"""What the ExLlama backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

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

from .tiles import MOST_TILED, candidates, default, padded_rows

PLUGIN_API = 1

LAYOUTS = frozenset({"gemm", "gemv", "gemv_fast", "llm_awq", "marlin"})
SCALED = ("gemv_fast", "llm_awq")  # these store zero points as -(scale * zero), in floating point
AMPERE = frozenset({"sm80", "sm86", "sm89", "sm90", "sm100", "sm120"})  # and later
TURING = frozenset({"sm75"})  # Triton does not reach its tensor cores, and they know no bfloat16
AMD = frozenset({"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"})


def _nbytes(spec: LinearSpec) -> int:
    words = spec.in_features // 8 * spec.out_features
    each = 4 if spec.layout in SCALED else 3
    return (4 * words + each * spec.groups * spec.out_features) * max(1, spec.experts)


def _probe(device: Device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


WORDS = ResidentLayout(
    "awq_words",
    lazy("awq_exllama.layout:prepare"),
    lazy("awq_exllama.layout:restore"),
    lazy("awq_exllama.layout:dequantize"),
    _nbytes,
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


def _signature(spec: LinearSpec, **more: str) -> dict[str, str]:
    zeros = "*fp16:16" if spec.layout in SCALED else "*u8:16"
    return {"words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": zeros, "W": "i32:16", "N": "i32:16"} | more


def _x(spec: LinearSpec) -> str:
    return {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[spec.dtype]


def _matmul_sources(spec: LinearSpec, every_rows: Sequence[int]) -> Iterator[TritonSource]:
    from . import kernels
    from .launch import COMBINED, late, uniform

    parts = _signature(spec, x_ptr=_x(spec), out_ptr="*fp32:16", GW="i32")
    whole = parts | {"out_ptr": _x(spec), "W": "i32", "N": "i32"}
    for rows, even in itertools.product(every_rows, (True, False)):
        tile = default(spec, rows)
        signature = parts if even else whole  # sums in one part, of a shape that no tile divides
        constants = {"NT": tile.columns, "R": tile.words, "UNIFORM": uniform(spec, tile)}
        constants |= {"SPLIT": 4 if even else 1, "EVEN": even}
        if rows == 1:
            yield TritonSource(kernels.rows, signature, constants, {"num_warps": tile.warps})
        else:
            constants |= {"MT": padded_rows(rows), "STAGES": tile.stages, "LATE": late(spec), "WIDE": False}
            yield TritonSource(kernels.tiles, signature | {"M": "i32"}, constants, {"num_warps": tile.warps})
    added = {"parts_ptr": "*fp32:16", "y_ptr": _x(spec), "MN": "i32"}
    yield TritonSource(kernels.combine, added, {"SPLIT": 4, "SIZE": COMBINED})


def _rows_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    return list(_matmul_sources(spec, (1,)))


def _tiles_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    return list(_matmul_sources(spec, (16, 32, 64)))


def _dequantize_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels

    signature = _signature(spec, out_ptr=_x(spec), GW="i32")
    return [TritonSource(kernels.dequantize, signature, {"NT": 128, "R": 16}, {"num_warps": 8})]


def _rows_tunables(spec: LinearSpec, rows: int) -> Sequence[dict[str, int]]:
    return candidates(spec, 1)


BACKEND = Backend(
    name="exllama",
    layouts=(WORDS,),
    kernels=(
        Kernel(
            name="rows",
            reads=WORDS.name,
            capabilities=_records(Rows(1, 1), on_turing=Rows(1, 8)),
            apply=lazy("awq_exllama.launch:rows"),
            sources=_rows_sources,
            tunables=_rows_tunables,
        ),
        Kernel(
            name="tiles",
            reads=WORDS.name,
            capabilities=_records(Rows(2, MOST_TILED), on_turing=None),
            apply=lazy("awq_exllama.launch:tiles"),
            sources=_tiles_sources,
            tunables=candidates,
        ),
        Kernel(
            name="dequantize",
            reads=WORDS.name,
            capabilities=_records(Rows(MOST_TILED + 1), on_turing=Rows(9)),
            apply=lazy("awq_exllama.launch:dequantize_matmul"),
            sources=_dequantize_sources,
        ),
    ),
    probe=_probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``exllama``."""
    return (BACKEND,)
