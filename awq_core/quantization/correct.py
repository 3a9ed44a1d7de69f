"""Weights that make up for the errors of earlier blocks, before they are rounded."""

from __future__ import annotations

import torch


def corrected(
    weight: torch.Tensor, square: torch.Tensor, drift: torch.Tensor, share: float, damping: float
) -> torch.Tensor:
    """The weight [N, K] whose output on the quantized model's input X is nearest to the dense model's output.

    ``square`` = X^T X and ``drift`` = (X_dense - X)^T X; the least-squares solution is ``W + W drift (square)^-1``,
    damped by a share of the mean of the diagonal and taken to the given ``share``.
    """
    damped = square.clone()
    damped.diagonal().add_(damping * float(square.diagonal().mean()) or 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return weight
    return weight + share * torch.cholesky_solve((weight @ drift).T, lower).T
