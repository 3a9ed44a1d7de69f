"""Launching the kernels: tiles, grids and scratch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
import triton

from awq_core.api import LinearSpec, Weight, tuned
from awq_core.fragments import chunk, layout
from awq_core.fragments.launch import COUNTERS, Launch, counters, interpreted, joins, ptx

from . import kernels
from .tiles import Tile, split_for, tile_for


def matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] on the tensor cores, float32 accumulation; core adds the bias."""
    spec, t = weight.spec, weight.tensors
    rows, n = x.shape[0], spec.out_features
    config = tuned("gemm.tiles", spec, rows, x.device)
    launch, split = _matmul(spec, x.device, rows, None if config is None else Tile(**config))
    y = x.new_empty(rows, n)
    launch(
        (
            x,
            t["words"],
            t["scales"],
            t["zeros"],
            y,
            torch.empty(split, rows, n, dtype=torch.float32, device=x.device) if split > 1 else y,
            counters(x.device) if split > 1 else y,
        ),
        spec.in_features,
        n,
        rows,
        spec.groups,
    )
    return y


@functools.lru_cache(maxsize=4096)
def _matmul(spec: LinearSpec, device: torch.device, rows: int, tile: Tile | None) -> tuple[Launch, int]:
    """The launch, and into how many parts it splits K."""
    k, n = spec.in_features, spec.out_features
    tile = tile or tile_for(rows, k, n, joins(device) and spec.group_size % 128 == 0)
    tiles = triton.cdiv(n, tile.n) * triton.cdiv(rows, tile.m)
    split = split_for(tile, rows, k, n) if tiles <= COUNTERS else 1
    constants = {
        "GP": spec.group_size // 16,
        "CH": chunk(spec.group_size),
        "NT": tile.n,
        "MT": tile.m,
        "SPLIT": split,
        "STAGES": tile.stages,
        "EVEN": k % 128 == 0,
        "FULL": n % tile.n == 0,
        "JOIN": joins(device),
        "PTX": ptx(),
        "WIDE": interpreted(),
    }
    return Launch(kernels.matmul, (tiles, split), constants, {"num_warps": tile.warps}), split


def forms(spec: LinearSpec, device: torch.device, every: Iterable[int]) -> list[int]:
    """Of these M one for each form of the kernel that Triton compiles."""
    found: dict[tuple[object, ...], int] = {}
    for rows in every:
        launch, _ = _matmul(spec, device, rows, None)
        found.setdefault((launch.values, rows % 16 == 0), rows)
    return list(found.values())


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
