"""How a decoder block is called: everything but the hidden states, as the model itself passed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """One recorded call. ``hidden`` [B, T, H] are its hidden states, which ``run`` replaces."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for ``hidden``; a tuple's first element."""
        out = block(hidden, *self.args, **self.kwargs)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def to(self, device: torch.device | str) -> Call:
        """The same call with its tensors on ``device``."""
        return Call(self.hidden.to(device), moved(self.args, device), moved(dict(self.kwargs), device))


def moved(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value
