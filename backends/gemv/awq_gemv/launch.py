"""Launching the kernel: tiles, grid and scratch."""

from __future__ import annotations

import functools

import torch
import triton

from awq_core.api import LinearSpec, Normed, Weight, tuned
from awq_core.fragments import chunk
from awq_core.fragments.launch import (
    COUNTERS,
    Launch,
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
    MOST_NORMED,
    REGISTERS,
    WARPS,
    Tile,
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


def one_norm(weight: Weight, normed: Normed, bias: torch.Tensor | None) -> torch.Tensor:
    """``one`` of a row that the kernel makes from the residual stream."""
    return _launch_one(weight, normed.x, weight.spec.out_features, bias=bias, normed=normed)


def one_norm_silu_mul(weight: Weight, normed: Normed) -> torch.Tensor:
    """``one_silu_mul`` of such a row."""
    return _launch_one(weight, normed.x, _half(weight), silu=True, normed=normed)


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


def _fits(normed: Normed) -> bool:
    """Whether the kernel can read it: one dtype, and 16 bytes at a time."""
    rows = [row for row in (normed.x, normed.plus, normed.weight, normed.out) if row is not None]
    return all(row.dtype == normed.x.dtype and row.data_ptr() % 16 == 0 for row in rows)


def _norm(normed: Normed) -> torch.Tensor:
    """What the kernel does with a ``Normed``, in operations of its own."""
    x, w, dtype = normed.x, normed.weight.float(), normed.x.dtype
    if normed.plus is not None:
        x = torch.add(x, normed.plus, out=normed.out)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + normed.eps)
    return (wide * (1.0 + w)).to(dtype) if normed.offset else (wide.to(dtype).float() * w).to(dtype)


def _launch_one(
    weight: Weight,
    x: torch.Tensor,
    width: int,
    silu: bool = False,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    normed: Normed | None = None,
) -> torch.Tensor:
    spec, t = weight.spec, weight.tensors
    k, n = spec.in_features, spec.out_features
    # Triton's interpreter does not know Gluon.
    plain = interpreted() or t["scales"].element_size() != 2
    if normed is not None and (plain or k > MOST_NORMED or not _fits(normed)):
        x, normed = _norm(normed), None
    if plain:
        return _launch(weight, x, width, silu, bias, other)
    plus = None if normed is None else normed.plus
    if x.data_ptr() % 16:  # it is read 16 bytes at a time
        x = x.clone()
    y = x.new_empty(1, width)
    norm = None if normed is None else (normed.offset, normed.eps)
    forms = (norm, plus is not None, bias is not None, silu, other is not None)
    launch = _one(spec, x.device, *forms)
    launch(
        (
            x,
            x if plus is None else plus,
            x if normed is None else normed.weight,
            x if normed is None else normed.out,
            t["words"],
            t["scales"],
            t["zeros"],
            y,
            y if bias is None else bias,
            y if other is None else other,
        ),
        k,
        n,
    )
    return y


@functools.cache
def _one(
    spec: LinearSpec,
    device: torch.device,
    norm: tuple[bool, float] | None,
    plus: bool,
    bias: bool,
    silu: bool,
    add: bool,
) -> Launch:
    k, width = spec.in_features, spec.out_features // 2 if silu else spec.out_features
    way = way_for(k, spec.out_features)
    offset, eps = norm or (False, 0.0)
    constants = {
        "GP": spec.group_size // 16,
        "B": BLOCKS,
        "STEPS": steps_for(k),
        "D": way.depth,
        "NORM": norm is not None,
        "PLUS": plus,
        "OFFSET": offset,
        "EPS": eps,
        "BIAS": bias,
        "SILU": silu,
        "ADD": add,
    }
    grid = (programs_for(way, width, multiprocessors(device)),)
    return Launch(one_kernel.one, grid, constants, {"num_warps": WARPS, **launch_options(device)})


def _launch(
    weight: Weight,
    x: torch.Tensor,
    width: int,
    silu: bool = False,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
) -> torch.Tensor:
    spec, t = weight.spec, weight.tensors
    rows, n = x.shape[0], spec.out_features
    config = tuned("gemv.few", spec, rows, x.device)
    tile = tile_for(rows, n) if config is None else Tile(**config)
    forms = (bias is not None, silu, other is not None)
    launch, split = _few(spec, x.device, rows, tile, *forms)
    y = x.new_empty(rows, width)
    launch(
        (
            x,
            t["words"],
            t["scales"],
            t["zeros"],
            y,
            y if bias is None else bias,
            y if other is None else other,
            torch.empty(split, rows, n, dtype=torch.float32, device=x.device) if split > 1 else y,
            counters(x.device) if split > 1 else y,
        ),
        spec.in_features,
        n,
        rows,
        spec.groups,
    )
    return y


@functools.cache
def _few(
    spec: LinearSpec,
    device: torch.device,
    rows: int,
    tile: Tile,
    bias: bool,
    silu: bool,
    add: bool,
) -> tuple[Launch, int]:
    """The launch, and into how many parts it splits K."""
    k, n = spec.in_features, spec.out_features
    out, width = (tile.columns // 2, n // 2) if silu else (tile.columns, n)  # columns of y, in a tile and in all
    tiles = triton.cdiv(width, out)
    split = split_for(tile, k, n) if tiles <= COUNTERS else 1
    constants = {
        "GP": spec.group_size // 16,
        "CH": chunk(spec.group_size),
        "NT": tile.columns,
        "MT": tile.rows,
        "SPLIT": split,
        "STAGES": tile.stages,
        "BIAS": bias,
        "SILU": silu,
        "ADD": add,
        "EVEN": k % 128 == 0,
        "FULL": width % out == 0,
        "JOIN": joins(device),
        "PTX": ptx(),
        "WIDE": interpreted(),
        "THREADS": 32 * tile.warps,
        "AHEAD": AHEAD if overlaps(device) else 0,
    }
    options = {"num_warps": tile.warps, **registers(), **launch_options(device)}
    return Launch(kernels.few, (tiles, split), constants, options), split
