"""Launching the kernels: grids, scratch and the choice between PTX and portable unpacking."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import triton

from awq_core.api import LinearSpec, Weight

from . import kernels
from .tiles import split_for, tile_for

COUNTERS = 1 << 14
CAPTURE = -1

_counters: dict[tuple[str, int | None, int], torch.Tensor] = {}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def portable() -> bool:
    """Whether the codes are unpacked without PTX: on AMD, and in the interpreter."""
    return torch.version.hip is not None or interpreted()


def counters(device: torch.device) -> torch.Tensor:
    """Zeros in which the parts of a tile count themselves; every kernel leaves them at zero.

    One buffer a stream, since kernels of one stream follow each other, and one for graph captures, which must not
    allocate it themselves. So two graphs must not be replayed at the same time on two streams.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    stream = CAPTURE if capturing or device.type != "cuda" else torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device.type, device.index, stream))
    if found is None:
        found = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if not capturing:
            _counters[device.type, device.index, stream] = found
            shared = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
            _counters.setdefault((device.type, device.index, CAPTURE), shared)
    return found


def matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] on the tensor cores, float32 accumulation; core adds the bias."""
    spec, t = weight.spec, weight.tensors
    rows, n = x.shape[0], spec.out_features
    tile = tile_for(rows)
    tiles = triton.cdiv(n, tile.n) * triton.cdiv(rows, tile.m)
    split = split_for(tile, rows, spec.in_features, n) if tiles <= COUNTERS else 1
    y = x.new_empty(rows, n)
    parts = torch.empty(split, rows, n, dtype=torch.float32, device=x.device) if split > 1 else y
    kernels.matmul[(tiles, split)](
        x,
        t["planes"],
        t["scales"],
        t["zeros"],
        y,
        parts,
        counters(x.device) if split > 1 else y,
        spec.in_features,
        n,
        rows,
        spec.groups,
        GP=spec.group_size // 16,
        MT=tile.m,
        NT=tile.n,
        SPLIT=split,
        STAGES=tile.stages,
        SCALE_LATE=tile.scale_late,
        EVEN=spec.in_features % 128 == 0 and n % tile.n == 0,
        PTX=not portable(),
        WIDE=interpreted(),
        num_warps=tile.warps,
    )
    return y


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N] in ``dtype``."""
    k, n = spec.in_features, spec.out_features
    out = torch.empty(k, n, dtype=dtype, device=tensors["planes"].device)
    kernels.dequantize[(triton.cdiv(n, 128), triton.cdiv(k, 128))](
        tensors["planes"],
        tensors["scales"],
        tensors["zeros"],
        out,
        k,
        n,
        spec.groups,
        GP=spec.group_size // 16,
        NT=128,
        PTX=not portable(),
        num_warps=4,
    )
    return out


def dequantize_matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] through a dense weight that lives for this call, and the vendor's matmul."""
    return x @ dequantize(weight.spec, weight.tensors, x.dtype)
