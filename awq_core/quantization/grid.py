"""The 4-bit grid of a group of weights, and rounding to it: what every search in this package tries out.

A grid is one scale and one integer zero point a (row, group). Weights are [N, K] as ``nn.Linear`` holds them, all in
float32; scales are rounded to the dtype in which they will be stored, so that what is searched is what is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..layouts import Codes
from .rtn import SMALLEST_STEP, TOP

SYMMETRIC_ZERO = TOP // 2 + 1


@dataclass(frozen=True)
class Grid:
    """``scales`` and ``zeros`` [N, G], float32; the scales hold values of the stored dtype exactly."""

    scales: torch.Tensor
    zeros: torch.Tensor

    def columns(self, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of each column: two [N, K]."""
        return self.scales.repeat_interleave(group_size, 1), self.zeros.repeat_interleave(group_size, 1)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest point of the grid for each weight [N, K]."""
        n, groups = self.scales.shape
        scales, zeros = self.scales.unsqueeze(2), self.zeros.unsqueeze(2)
        codes = weight.reshape(n, groups, -1).div(scales).round_().clamp_(-zeros, TOP - zeros)
        return codes.mul_(scales).reshape(weight.shape)

    def codes(self, rounded: torch.Tensor, dtype: torch.dtype) -> Codes:
        """The stored form of a weight [N, K] that lies on this grid."""
        n, groups = self.scales.shape
        codes = rounded.reshape(n, groups, -1).div(self.scales.unsqueeze(2)).round_().add_(self.zeros.unsqueeze(2))
        return Codes(
            codes.clamp_(0, TOP).to(torch.uint8).reshape(n, -1).T.contiguous(),
            self.zeros.to(torch.uint8).T.contiguous(),
            self.scales.to(dtype).T.contiguous(),
        )


def fit(low: torch.Tensor, high: torch.Tensor, zero_point: bool, dtype: torch.dtype = torch.float16) -> Grid:
    """The grid that spans ``low`` to ``high`` [N, G] (AutoAWQ's, with a range that always holds zero).

    Raises:
        CheckpointError: a range is not finite, or its scale does not fit ``dtype``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if zero_point:
        scales = _stored((high - low) / TOP, dtype)
        zeros = (-low / scales).round_().clamp_(0, TOP)
    else:
        scales = _stored(torch.maximum(-low, high) / (TOP // 2), dtype)
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"the weight holds NaN or inf, or its scales do not fit {dtype}")
    return Grid(scales, zeros)


def ranges(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of each group: two [N, G]."""
    low, high = torch.aminmax(weight.reshape(weight.shape[0], -1, group_size), dim=2)
    return low, high


def nearest(weight: torch.Tensor, group_size: int, zero_point: bool) -> torch.Tensor:
    """``weight`` [N, K] rounded to nearest on the grid of its own ranges."""
    return fit(*ranges(weight, group_size), zero_point).round(weight)


def _stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scales.clamp(min=SMALLEST_STEP).to(dtype).float()
