"""Launching the kernels: tiles, grids and scratch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton

from awq_core.api import LinearSpec, Weight
from awq_core.fragments import chunk, layout
from awq_core.fragments.launch import COUNTERS, counters, interpreted, joins, ptx

from . import kernels
from .tiles import split_for, tile_for


def matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] on the tensor cores, float32 accumulation; core adds the bias."""
    spec, t = weight.spec, weight.tensors
    rows, k, n = x.shape[0], spec.in_features, spec.out_features
    tile = tile_for(rows, k, n, joins(x.device) and spec.group_size % 128 == 0)
    tiles = triton.cdiv(n, tile.n) * triton.cdiv(rows, tile.m)
    split = split_for(tile, rows, k, n) if tiles <= COUNTERS else 1
    y = x.new_empty(rows, n)
    parts = torch.empty(split, rows, n, dtype=torch.float32, device=x.device) if split > 1 else y
    kernels.matmul[(tiles, split)](
        x,
        t["words"],
        t["scales"],
        t["zeros"],
        y,
        parts,
        counters(x.device) if split > 1 else y,
        k,
        n,
        rows,
        spec.groups,
        GP=spec.group_size // 16,
        CH=chunk(spec.group_size),
        NT=tile.n,
        MT=tile.m,
        SPLIT=split,
        STAGES=tile.stages,
        EVEN=k % 128 == 0,
        FULL=n % tile.n == 0,
        JOIN=joins(x.device),
        PTX=ptx(),
        WIDE=interpreted(),
        num_warps=tile.warps,
    )
    return y


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N] in ``dtype``; on a GPU in 16 bits by a kernel that runs at the speed of memory."""
    if not tensors["words"].is_cuda or dtype not in (torch.float16, torch.bfloat16):
        return layout.dequantize(spec, tensors, dtype)
    k, n = spec.in_features, spec.out_features
    out = torch.empty(n, k, dtype=dtype, device=tensors["words"].device)
    kernels.dequantize[(triton.cdiv(k, 128), triton.cdiv(n, 64))](
        tensors["words"],
        tensors["scales"],
        tensors["zeros"],
        out,
        k,
        n,
        spec.groups,
        GP=spec.group_size // 16,
        CH=chunk(spec.group_size),
        NT=64,
        PTX=ptx(),
        num_warps=4,
    )
    return out.T


def dequantize_matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] through a dense weight that lives for this call, and the vendor's matmul."""
    return x @ dequantize(weight.spec, weight.tensors, x.dtype)
