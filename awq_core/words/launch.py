"""Launching kernels on ``awq_words``: scratch, which lives for the call and comes from torch's allocator, and grids.

x is [M, K] and the result [M, N], both in ``weight.spec.dtype``, summed in float32; core adds the bias.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import triton

from ..kernel import Weight
from ..spec import LinearSpec
from . import kernels
from .tiles import COMBINED, DENSE, Tile, constants


def rows(weight: Weight, x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Each row of x by itself, in float32."""
    columns = triton.cdiv(weight.spec.out_features, tile.columns)
    return _multiply(kernels.rows, (columns, tile.split, x.shape[0]), weight, x, tile)


def tiles(
    kernel: Any, programs: int, weight: Weight, x: torch.Tensor, tile: Tile, **settings: int | bool
) -> torch.Tensor:
    """Tiles of y on the tensor cores: ``kernel`` deals them out to ``programs`` and calls ``kernels.product``.

    ``settings`` are its constants beside those of the tile.
    """
    settings |= {"STAGES": tile.stages, "WIDE": os.environ.get("TRITON_INTERPRET") == "1"}
    return _multiply(kernel, (programs, tile.split), weight, x, tile, M=x.shape[0], **settings)


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N] in ``dtype``, float16 or bfloat16."""
    k, n = spec.in_features, spec.out_features
    out = torch.empty(k, n, dtype=dtype, device=tensors["words"].device)
    kernels.dequantize[(triton.cdiv(n, DENSE.columns), triton.cdiv(k, 8 * DENSE.words))](
        tensors["words"],
        tensors["scales"],
        tensors["zeros"],
        out,
        k // 8,
        n,
        spec.group_size // 8,
        NT=DENSE.columns,
        R=DENSE.words,
        **DENSE.options(),
    )
    return out


def dequantize_matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Through a dense weight that lives for this call, and the library's matmul."""
    return x @ dequantize(weight.spec, weight.tensors, x.dtype)


def _multiply(
    kernel: Any, grid: tuple[int, ...], weight: Weight, x: torch.Tensor, tile: Tile, **settings: int | bool
) -> torch.Tensor:
    """y by one kernel, and by ``combine`` behind it where K is split: the kernel then writes parts [SPLIT, M, N]."""
    spec, t = weight.spec, weight.tensors
    y = x.new_empty(x.shape[0], spec.out_features)
    out = y if tile.split == 1 else torch.empty(tile.split, *y.shape, dtype=torch.float32, device=x.device)
    kernel[grid](
        x,
        t["words"],
        t["scales"],
        t["zeros"],
        out,
        spec.in_features // 8,
        spec.out_features,
        GW=spec.group_size // 8,
        **settings,
        **constants(spec, tile),
        **tile.options(),
    )
    if tile.split > 1:
        kernels.combine[(triton.cdiv(y.numel(), COMBINED),)](out, y, y.numel(), SPLIT=tile.split, SIZE=COMBINED)
    return y
