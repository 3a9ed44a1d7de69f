"""Rounding with error feedback on a given grid (Frantar et al., arXiv 2210.17323, with groups fixed beforehand).

Columns are rounded one after the other; the error that each leaves in the output is taken back by those still to come,
as well as the second moments of the input allow. The grid is AWQ's own, found before on the scaled weight, so columns
may be taken in any order: those with the strongest input go first, while there is most to correct with.
"""

from __future__ import annotations

import torch

from .grid import Grid
from .rtn import TOP

DAMPING = 0.01
BLOCK = 128  # columns whose corrections to later columns are applied in one matmul


def round_with_feedback(
    weight: torch.Tensor, moments: torch.Tensor, grid: Grid, group_size: int, damping: float = DAMPING
) -> torch.Tensor:
    """``weight`` [N, K] on ``grid``, with a small ``tr(D H D^T)`` for the moments H [K, K]."""
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    upper = _feedback(moments[order][:, order], damping)
    scales, zeros = (t[:, order].T.contiguous() for t in grid.columns(group_size))  # [K, N], a column is contiguous
    low, high = -zeros * scales, (TOP - zeros) * scales
    left = weight[:, order].T.contiguous()
    done = torch.empty_like(left)
    columns = left.shape[0]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(stop - start, left.shape[1], device=left.device)
        for i in range(start, stop):
            column = left[i]
            rounded = torch.mul((column / scales[i]).round_(), scales[i], out=done[i])
            torch.minimum(torch.maximum(rounded, low[i], out=rounded), high[i], out=rounded)
            error = torch.div(column - rounded, upper[i, i], out=errors[i - start])
            if i + 1 < stop:
                left[i + 1 : stop].addr_(upper[i, i + 1 : stop], error, alpha=-1)
        if stop < columns:
            left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    out = torch.empty_like(weight)
    out[:, order] = done.T
    return out


def _feedback(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; damping grows until it exists."""
    mean = float(moments.diagonal().mean()) or 1.0
    for _ in range(8):
        damped = moments.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return torch.as_tensor(upper)
        damping *= 10
    return torch.eye(len(moments), device=moments.device)
