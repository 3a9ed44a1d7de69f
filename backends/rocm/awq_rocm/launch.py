"""Launching the kernels: tiles, grids and scratch, which lives for the call and comes from torch's allocator."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import triton

from awq_core.api import LinearSpec, Weight, tuned

from . import kernels
from .tiles import DIES, Tile, default

COMBINED = 512  # elements of y that one program of ``combine`` adds up


def rows(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N], each row by itself, in float32; core adds the bias."""
    spec, t, m = weight.spec, weight.tensors, x.shape[0]
    tile = _tile("rows", spec, m, x.device) or default(spec, 1)
    y, out = _outputs(x, spec, tile)
    kernels.rows[(triton.cdiv(spec.out_features, tile.columns), tile.split, m)](
        x,
        t["words"],
        t["scales"],
        t["zeros"],
        out,
        spec.in_features // 8,
        spec.out_features,
        spec.group_size // 8,
        **constants(spec, tile),
        **options(tile),
    )
    return _combined(y, out, tile)


def tiles(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] on the matrix cores, float32 accumulation; core adds the bias."""
    spec, t, m = weight.spec, weight.tensors, x.shape[0]
    tile = _tile("tiles", spec, m, x.device) or default(spec, m)
    y, out = _outputs(x, spec, tile)
    kernels.tiles[(triton.cdiv(spec.out_features, tile.columns) * triton.cdiv(m, tile.rows), tile.split)](
        x,
        t["words"],
        t["scales"],
        t["zeros"],
        out,
        spec.in_features // 8,
        spec.out_features,
        m,
        spec.group_size // 8,
        MT=tile.rows,
        STAGES=tile.stages,
        XCDS=DIES.get(spec.device.arch, 1),
        WIDE=os.environ.get("TRITON_INTERPRET") == "1",
        **constants(spec, tile),
        **options(tile),
    )
    return _combined(y, out, tile)


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N] in ``dtype``."""
    k, n = spec.in_features, spec.out_features
    out = torch.empty(k, n, dtype=dtype, device=tensors["words"].device)
    kernels.dequantize[(triton.cdiv(n, 128), triton.cdiv(k, 128))](
        tensors["words"],
        tensors["scales"],
        tensors["zeros"],
        out,
        k // 8,
        n,
        spec.group_size // 8,
        NT=128,
        R=16,
        num_warps=8,
    )
    return out


def dequantize_matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] through a dense weight that lives for this call, and the library's matmul."""
    return x @ dequantize(weight.spec, weight.tensors, x.dtype)


def uniform(spec: LinearSpec, tile: Tile) -> bool:
    """Whether each step of a tile lies in one group."""
    return spec.group_size % (8 * tile.words) == 0 or spec.groups == 1


def _tile(name: str, spec: LinearSpec, m: int, device: torch.device) -> Tile | None:
    """What ``awq tune`` has found on this device for this problem."""
    config = tuned(f"rocm.{name}", spec, m, device)
    return None if config is None else Tile(**config)


def constants(spec: LinearSpec, tile: Tile) -> dict[str, int | bool]:
    """What both kernels are compiled for."""
    even = spec.in_features % (8 * tile.words) == 0 and spec.out_features % tile.columns == 0
    return {
        "NT": tile.columns,
        "R": tile.words,
        "SPLIT": tile.split,
        "UNIFORM": uniform(spec, tile),
        "EVEN": even,
    }


def options(tile: Tile) -> dict[str, int]:
    """What Triton's AMD compiler is told of a tile."""
    return {"num_warps": tile.warps, "waves_per_eu": tile.waves, "matrix_instr_nonkdim": tile.instr}


def _outputs(x: torch.Tensor, spec: LinearSpec, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N], and what the kernel writes: y itself or the parts of its sums."""
    m, n = x.shape[0], spec.out_features
    y = x.new_empty(m, n)
    return y, y if tile.split == 1 else torch.empty(tile.split, m, n, dtype=torch.float32, device=x.device)


def _combined(y: torch.Tensor, out: torch.Tensor, tile: Tile) -> torch.Tensor:
    if tile.split > 1:
        kernels.combine[(triton.cdiv(y.numel(), COMBINED),)](out, y, y.numel(), SPLIT=tile.split, SIZE=COMBINED)
    return y
