"""Launching the kernels: which tile, and in how many programs."""

from __future__ import annotations

import torch
import triton

from awq_core.api import LinearSpec, Weight, tuned
from awq_core.words import launch
from awq_core.words.tiles import Tile

from . import kernels
from .tiles import default, padded_rows


def rows(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N], each row by itself, in float32; core adds the bias."""
    return launch.rows(weight, x, _tuned("rows", weight.spec, x) or default(weight.spec, 1))


def tiles(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], M at most 64, to [M, N] on the tensor cores, float32 accumulation; core adds the bias."""
    spec, m = weight.spec, x.shape[0]
    tile = _tuned("tiles", spec, x) or default(spec, m)
    programs = triton.cdiv(spec.out_features, tile.columns)
    return launch.tiles(kernels.tiles, programs, weight, x, tile, MT=padded_rows(m), LATE=late(spec))


def late(spec: LinearSpec) -> bool:
    """Whether sums are scaled, not weights: Triton 3.7 fails to compile that for sm100 where shapes are odd."""
    return spec.device.arch != "sm100"


def _tuned(name: str, spec: LinearSpec, x: torch.Tensor) -> Tile | None:
    """What ``awq tune`` has found on this device for this problem."""
    config = tuned(f"exllama.{name}", spec, x.shape[0], x.device)
    return None if config is None else Tile(**config)
