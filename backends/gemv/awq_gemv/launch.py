"""Launching the kernel: tiles, grid and scratch."""

from __future__ import annotations

import torch
import triton

from awq_core.api import Weight
from awq_core.fragments import chunk
from awq_core.fragments.launch import (
    COUNTERS,
    counters,
    interpreted,
    joins,
    launch_options,
    multiprocessors,
    overlaps,
    ptx,
)

from . import kernels
from . import one as one_kernel
from .tiles import (
    AHEAD,
    BLOCKS,
    REGISTERS,
    STAGES,
    WARPS,
    programs_for,
    split_for,
    steps_for,
    tile_for,
    way_for,
)


def registers() -> dict[str, int]:
    """The launch option that caps the registers of a thread; AMD's compiler and the interpreter have none."""
    return {"maxnreg": REGISTERS} if ptx() else {}


def one(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [1, K] to [1, N] on Hopper; float32 accumulation, rounded before the bias is added."""
    return _launch_one(weight, x, weight.spec.out_features, bias=bias)


def one_silu_mul(weight: Weight, x: torch.Tensor) -> torch.Tensor:
    """``silu_mul`` of one row."""
    return _launch_one(weight, x, _half(weight), silu=True)


def one_add(weight: Weight, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``add`` of one row."""
    return _launch_one(weight, x, weight.spec.out_features, other=other)


def few(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], M at most 16, to [M, N]; float32 accumulation, rounded before the bias is added."""
    return _launch(weight, x, weight.spec.out_features, bias=bias)


def silu_mul(weight: Weight, x: torch.Tensor) -> torch.Tensor:
    """For gate and up joined on N: x [M, K] to ``silu(x gate) * (x up)`` [M, N/2]; N a multiple of 32."""
    return _launch(weight, x, _half(weight), silu=True)


def add(weight: Weight, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x [M, K] to ``x w + other`` [M, N], where ``other`` [M, N] is contiguous and in the same dtype."""
    return _launch(weight, x, weight.spec.out_features, other=other)


def _half(weight: Weight) -> int:
    half, odd = divmod(weight.spec.out_features, 2)
    if odd or half % 16:
        raise ValueError(f"silu_mul takes gate and up of a multiple of 16 columns each, not {half}")
    return half


def _launch_one(
    weight: Weight,
    x: torch.Tensor,
    width: int,
    silu: bool = False,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
) -> torch.Tensor:
    spec, t = weight.spec, weight.tensors
    k, n = spec.in_features, spec.out_features
    # Triton's interpreter does not know Gluon.
    if interpreted() or t["scales"].element_size() != 2:
        return _launch(weight, x, width, silu, bias, other)
    way = way_for(k, n)
    if x.data_ptr() % 16:  # it is read 16 bytes at a time
        x = x.clone()
    y = x.new_empty(1, width)
    one_kernel.one[(programs_for(way, width, multiprocessors(x.device)),)](
        x,
        t["words"],
        t["scales"],
        t["zeros"],
        y,
        y if bias is None else bias,
        y if other is None else other,
        k,
        n,
        GP=spec.group_size // 16,
        B=BLOCKS,
        STEPS=steps_for(k),
        D=way.depth,
        BIAS=bias is not None,
        SILU=silu,
        ADD=other is not None,
        num_warps=WARPS,
        **launch_options(x.device),
    )
    return y


def _launch(
    weight: Weight,
    x: torch.Tensor,
    width: int,
    silu: bool = False,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
) -> torch.Tensor:
    spec, t = weight.spec, weight.tensors
    rows, k, n = x.shape[0], spec.in_features, spec.out_features
    columns, mt, fill = tile_for(rows, n)
    out = columns // 2 if silu else columns  # columns of y in a tile
    tiles = triton.cdiv(width, out)
    split = split_for(columns, fill, k, n) if tiles <= COUNTERS else 1
    y = x.new_empty(rows, width)
    parts = torch.empty(split, rows, n, dtype=torch.float32, device=x.device) if split > 1 else y
    kernels.few[(tiles, split)](
        x,
        t["words"],
        t["scales"],
        t["zeros"],
        y,
        y if bias is None else bias,
        y if other is None else other,
        parts,
        counters(x.device) if split > 1 else y,
        k,
        n,
        rows,
        spec.groups,
        GP=spec.group_size // 16,
        CH=chunk(spec.group_size),
        NT=columns,
        MT=mt,
        SPLIT=split,
        STAGES=STAGES,
        BIAS=bias is not None,
        SILU=silu,
        ADD=other is not None,
        EVEN=k % 128 == 0,
        FULL=width % out == 0,
        JOIN=joins(x.device),
        PTX=ptx(),
        WIDE=interpreted(),
        THREADS=32 * WARPS,
        AHEAD=AHEAD if overlaps(x.device) else 0,
        num_warps=WARPS,
        **registers(),
        **launch_options(x.device),
    )
    return y
