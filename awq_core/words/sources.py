"""The Triton functions on ``awq_words`` as they are launched, so that they compile for GPUs that are not here.

Each ``out_ptr`` takes parts in float32 or y itself; both are listed, the first for a shape that the tiles divide.
Importing this imports no Triton.
"""

from __future__ import annotations

from typing import Any

from ..kernel import TritonSource
from ..spec import LinearSpec
from . import SCALED
from .tiles import COMBINED, DENSE, Tile, constants

DTYPES = {"float16": "*fp16:16", "bfloat16": "*bf16:16"}


def rows(spec: LinearSpec, tile: Tile) -> list[TritonSource]:
    """What ``launch.rows`` launches."""
    from . import kernels

    return [combine(spec), *multiply(kernels.rows, {}, spec, tile)]


def tiles(kernel: Any, spec: LinearSpec, tile: Tile, **settings: int | bool) -> list[TritonSource]:
    """What ``launch.tiles`` launches with these settings, ``combine`` left out."""
    settings |= {"STAGES": tile.stages, "WIDE": False}
    return multiply(kernel, {"M": "i32"}, spec, tile, **settings)


def multiply(
    kernel: Any, more: dict[str, str], spec: LinearSpec, tile: Tile, **settings: int | bool
) -> list[TritonSource]:
    """A kernel for a usual shape with sums in parts, and for one that no tile divides, in one part.

    ``more`` are the types of its arguments beside those that all have.
    """
    y = DTYPES[spec.dtype]
    parts = _signature(spec) | {"x_ptr": y, "out_ptr": "*fp32:16"} | more
    whole = parts | {"out_ptr": y, "W": "i32", "N": "i32"}
    found = constants(spec, tile) | settings
    return [
        TritonSource(kernel, parts, found | {"SPLIT": 4, "EVEN": True}, tile.options()),
        TritonSource(kernel, whole, found | {"SPLIT": 1, "EVEN": False}, tile.options()),
    ]


def combine(spec: LinearSpec) -> TritonSource:
    """The kernel that adds up parts."""
    from . import kernels

    signature = {"parts_ptr": "*fp32:16", "y_ptr": DTYPES[spec.dtype], "MN": "i32"}
    return TritonSource(kernels.combine, signature, {"SPLIT": 4, "SIZE": COMBINED})


def dequantize(spec: LinearSpec) -> list[TritonSource]:
    """What ``launch.dequantize_matmul`` launches."""
    from . import kernels

    signature = _signature(spec) | {"out_ptr": DTYPES[spec.dtype]}
    return [TritonSource(kernels.dequantize, signature, {"NT": DENSE.columns, "R": DENSE.words}, DENSE.options())]


def _signature(spec: LinearSpec) -> dict[str, str]:
    zeros = "*fp16:16" if spec.layout in SCALED else "*u8:16"
    pointers = {"words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": zeros}
    return pointers | {"W": "i32:16", "N": "i32:16", "GW": "i32"}
