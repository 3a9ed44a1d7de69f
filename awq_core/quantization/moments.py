"""Second moments of the linears' inputs, gathered while a block runs over the calibration tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .fold import Group

DEAD = 1e-12  # mean square below which a channel was never used


class Moments:
    """Of one input [T, K]: ``square`` = X^T X, ``magnitude`` = sum of |X|, ``count`` = T, all sums so far.

    ``drift`` = (X_dense - X)^T X where the same tokens were run through the dense model too, else None.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.square = torch.zeros(width, width, device=device)
        self.magnitude = torch.zeros(width, device=device)
        self.count = 0
        self.drift: torch.Tensor | None = None

    def add(self, x: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Take tokens x [T, K], and the dense model's for the same tokens."""
        self.square.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0)
        self.count += len(x)
        if dense is not None and dense.shape == x.shape:
            if self.drift is None:
                self.drift = torch.zeros_like(self.square)
            self.drift.addmm_((dense - x).T, x)

    @property
    def mean_square(self) -> torch.Tensor:
        """H = X^T X / T, [K, K]."""
        return self.square / max(1, self.count)

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """Mean of |x|, [K]."""
        return self.magnitude / max(1, self.count)

    @property
    def dead(self) -> int:
        """How many channels were zero on every token."""
        return int((self.square.diagonal() / max(1, self.count) <= DEAD).sum())


@contextmanager
def inputs_of(block: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, torch.Tensor]]:
    """While the block runs: the input [T, K] of the first linear of each set in ``groups``, by that linear's name."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> object:
        def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1])

        return block.get_submodule(name).register_forward_pre_hook(take)

    hooks = [hook(names[0]) for group in groups for names in group.inputs]
    try:
        yield seen
    finally:
        for handle in hooks:
            handle.remove()  # type: ignore[attr-defined]
