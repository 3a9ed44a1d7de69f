"""Launching the kernel: grid, scratch and the choice between PTX and portable unpacking."""

from __future__ import annotations

import os

import torch
import triton

from awq_core.api import Weight

from . import kernels
from .tiles import BLOCKS, COLUMNS, WARPS, split_for

COUNTERS = 1 << 14
CAPTURE = -1

_counters: dict[tuple[str, int | None, int], torch.Tensor] = {}


def counters(device: torch.device) -> torch.Tensor:
    """Zeros in which the parts of a tile count themselves; the kernel leaves them at zero.

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


def gemv(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N], each row by itself, in float32; core adds the bias."""
    spec, t = weight.spec, weight.tensors
    rows, k, n = x.shape[0], spec.in_features, spec.out_features
    tiles = triton.cdiv(n, COLUMNS)
    split = split_for(k, n) if tiles * rows <= COUNTERS else 1
    y = x.new_empty(rows, n)
    parts = torch.empty(rows, split, n, dtype=torch.float32, device=x.device) if split > 1 else y
    kernels.gemv[(tiles, split, rows)](
        x,
        t["planes"],
        t["scales"],
        t["zeros"],
        y,
        parts,
        counters(x.device) if split > 1 else y,
        k,
        n,
        spec.groups,
        GP=spec.group_size // 16,
        NT=COLUMNS,
        BLOCKS=BLOCKS,
        SPLIT=split,
        EVEN=k % (128 * BLOCKS) == 0 and n % COLUMNS == 0,
        PTX=torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1",
        num_warps=WARPS,
    )
    return y
