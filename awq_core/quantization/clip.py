"""The search for tighter ranges (the paper's weight clipping): a range cut short rounds the many finer, the few worse.

For each (row, group) ranges shrunk by up to half are tried; the loss is the error of this group's share of the output,
``d H d^T`` with the group's own block of the second moments.
"""

from __future__ import annotations

import torch

from .grid import Grid, fit, ranges

STEPS, DEEPEST = 20, 0.5  # AutoAWQ tries the first half of 20 steps
CHUNK = 2**22  # weights at a time, so that temporaries stay in the cache's neighbourhood


def search_ranges(weight: torch.Tensor, moments: torch.Tensor, group_size: int, zero_point: bool) -> Grid:
    """The best grid of each (row, group) of ``weight`` [N, K] whose inputs have the second moments [K, K]."""
    blocks = _diagonal_blocks(moments, group_size)
    found = [_search(w, blocks, group_size, zero_point) for w in torch.split(weight, max(1, CHUNK // weight.shape[1]))]
    return Grid(torch.cat([g.scales for g in found]), torch.cat([g.zeros for g in found]))


def _search(weight: torch.Tensor, blocks: torch.Tensor, group_size: int, zero_point: bool) -> Grid:
    low, high = ranges(weight, group_size)
    best_loss, best = None, fit(low, high, zero_point)
    for step in range(int(STEPS * DEEPEST)):
        shrink = 1 - step / STEPS
        grid = fit(low * shrink, high * shrink, zero_point)
        loss = group_losses(grid.round(weight).sub_(weight), blocks, group_size)
        if best_loss is None:
            best_loss, best = loss, grid
            continue
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best = Grid(torch.where(better, grid.scales, best.scales), torch.where(better, grid.zeros, best.zeros))
    return best


def _diagonal_blocks(moments: torch.Tensor, group_size: int) -> torch.Tensor:
    """[K, K] to [G, g, g]."""
    groups = len(moments) // group_size
    cut = moments.reshape(groups, group_size, groups, group_size)
    return cut.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def group_losses(error: torch.Tensor, blocks: torch.Tensor, group_size: int) -> torch.Tensor:
    """``d H d^T`` of each (row, group): error [N, K], blocks [G, g, g] to [N, G]."""
    grouped = error.view(error.shape[0], -1, group_size).transpose(0, 1)  # [G, N, g]
    return ((grouped @ blocks) * grouped).sum(2).T
