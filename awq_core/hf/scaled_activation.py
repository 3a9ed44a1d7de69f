"""ScaledActivation: where an architecture has no weight to fold a scale into, AWQ stores it beside the activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class ScaledActivation(nn.Module):
    """``act(x) / scales``, scales [N] of the layer before, kept in the dtype in which they are stored."""

    def __init__(self, act: nn.Module, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(torch.ones(size, dtype=dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., N] to [..., N]."""
        y: torch.Tensor = self.act(x)
        return y / self.scales.to(y.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ScaledActivation:
        stored = self.scales.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != stored.dtype:
            self.scales = nn.Parameter(stored.to(self.scales.device), requires_grad=False)
        return self
