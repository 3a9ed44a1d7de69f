"""The search for the scales of the input channels (Lin et al., arXiv 2306.00978, section 3.2), on second moments.

Scaling input channel k of a weight by s[k] and the activation by 1/s[k] changes nothing but the rounding. The paper
tries ``s = x^a / w^(1-a)`` for some ratios a between 0 and 1, x the mean magnitude of the channel's activations and w
that of its weights, and keeps the best. The loss here is the error of the linear's output over the calibration tokens,
``tr(D H D^T)`` with D the rounding error and H = X^T X / n: the same number as by running the tokens through again, at
a cost that does not depend on how many they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .grid import nearest

STRIDES = (4, 2, 1)  # of the coarse search: 9 losses for 20 ratios

Tie = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Target:
    """One linear of a group: its weight [N, K] and the second moments [K, K] of its input."""

    weight: torch.Tensor
    moments: torch.Tensor


@dataclass(frozen=True)
class Found:
    """The best scales [K], their loss, the loss without any, and their ratio (None: no scales are best)."""

    scales: torch.Tensor
    loss: float
    plain: float
    ratio: float | None


def search_scales(
    targets: Sequence[Target],
    magnitude: torch.Tensor,
    group_size: int,
    zero_point: bool,
    steps: int = 20,
    duo: bool = True,
    tie: Tie | None = None,
    coarse: bool = False,
) -> Found:
    """The scales for linears that read the same input, whose mean magnitudes are ``magnitude`` [K].

    ``duo`` divides by the weights' magnitudes as well (AutoAWQ's duo_scaling). ``tie`` makes scales equal that one
    channel of the op before feeds. ``coarse`` tries every fourth ratio first and then those beside the best one.
    """
    weights = _weight_magnitude([t.weight for t in targets], group_size) if duo else None

    def candidate(ratio: float) -> torch.Tensor:
        scales = magnitude.clamp(min=1e-4).pow(ratio)
        if weights is not None:
            scales = scales / (weights.pow(1 - ratio) + 1e-4)
        scales = scales.clamp(min=1e-4)
        if tie is not None:
            scales = tie(scales)
        scales = scales / (scales.max() * scales.min()).sqrt()
        return torch.where(torch.isfinite(scales) & (scales > 0), scales, torch.ones_like(scales))

    def loss(scales: torch.Tensor | None) -> float:
        return sum(output_error(t, scales, group_size, zero_point) for t in targets)

    plain = loss(None)
    losses: dict[int, float] = {}
    for stride in STRIDES if coarse else (1,):
        near = min(losses, key=losses.__getitem__) if losses else None
        for step in range(0, steps, stride) if near is None else (near - stride, near + stride):
            if 0 <= step < steps and step not in losses:
                losses[step] = loss(candidate(step / steps))
    best = min(losses, key=losses.__getitem__, default=0)
    if not losses or not losses[best] < plain:
        return Found(torch.ones_like(magnitude), plain, plain, None)
    return Found(candidate(best / steps), losses[best], plain, best / steps)


def output_error(target: Target, scales: torch.Tensor | None, group_size: int, zero_point: bool) -> float:
    """Mean squared error of the output (summed over N) when the scaled weight is rounded to nearest."""
    weight = target.weight
    scaled = weight if scales is None else weight * scales
    error = nearest(scaled, group_size, zero_point)
    if scales is not None:
        error /= scales
    return quadratic(error.sub_(weight), target.moments)


def quadratic(error: torch.Tensor, moments: torch.Tensor) -> float:
    """``tr(D H D^T)``."""
    return float(torch.sum((error @ moments) * error))


def _weight_magnitude(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """Mean over all rows of |w| relative to the largest of its group: [K]."""
    together = torch.cat([w.abs() for w in weights])
    grouped = together.view(together.shape[0], -1, group_size)
    return (grouped / (grouped.amax(2, keepdim=True) + 1e-6)).view(together.shape).mean(0)
