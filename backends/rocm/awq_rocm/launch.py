"""Launching the kernels: which tile, and in how many programs."""

from __future__ import annotations

import torch

from awq_core.api import LinearSpec, Weight, tuned
from awq_core.words import launch

from . import kernels
from .tiles import AmdTile, default, dies, tiles_of


def rows(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N], each row by itself, in float32; core adds the bias."""
    return launch.rows(weight, x, _tuned("rows", weight.spec, x) or default(weight.spec, 1))


def tiles(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N] on the matrix cores, float32 accumulation; core adds the bias."""
    spec, m = weight.spec, x.shape[0]
    tile = _tuned("tiles", spec, x) or default(spec, m)
    programs = tiles_of(spec, m, tile.rows, tile.columns)
    return launch.tiles(kernels.tiles, programs, weight, x, tile, MT=tile.rows, XCDS=dies(spec))


def _tuned(name: str, spec: LinearSpec, x: torch.Tensor) -> AmdTile | None:
    """What ``awq tune`` has found on this device for this problem."""
    config = tuned(f"rocm.{name}", spec, x.shape[0], x.device)
    return None if config is None else AmdTile(**config)
