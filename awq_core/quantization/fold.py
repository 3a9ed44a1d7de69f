"""Folding scales: the linears' columns times s, whatever comes before divided by s, and the block computes the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Norm:
    """A norm whose gain is ``weight + offset``, with or without a bias."""

    path: str
    offset: float


@dataclass(frozen=True, eq=False)
class Rows:
    """A linear: input channel j of the group is fed by its output ``rows[j]``, through a factor that is no weight."""

    path: str
    rows: torch.Tensor


@dataclass(frozen=True)
class Activation:
    """An activation module that gets a ``scales`` tensor of its own."""

    path: str


Before = Norm | Rows | Activation


@dataclass(frozen=True)
class Group:
    """Linears whose inputs are scaled together.

    ``linears`` are to be quantized; ``consumers`` are all parameters whose columns the scale multiplies (a router's
    too); ``inputs`` parts the linears by what they really read (each expert reads its own tokens).
    """

    linears: tuple[str, ...]
    consumers: tuple[str, ...]
    inputs: tuple[tuple[str, ...], ...]
    before: Before | None

    @property
    def tied(self) -> bool:
        """Whether several channels are fed by the same one, as in grouped-query attention."""
        return isinstance(self.before, Rows) and len(torch.unique(self.before.rows)) < len(self.before.rows)

    def tie(self, scales: torch.Tensor) -> torch.Tensor:
        """``scales`` [K] made equal (the geometric mean) where channels share their source."""
        if not self.tied:
            return scales
        assert isinstance(self.before, Rows)
        rows = self.before.rows.cpu()  # where the order of the sums is always the same
        total = torch.zeros(int(rows.max()) + 1).index_add_(0, rows, scales.log().cpu())
        return (total / torch.bincount(rows).clamp(min=1))[rows].exp().to(scales.device)


class ScaledActivation(nn.Module):
    """``act(x) / scales``: only for calibration; the loader has its own."""

    def __init__(self, act: nn.Module, scales: torch.Tensor) -> None:
        super().__init__()
        self.act = act
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., K]."""
        y: torch.Tensor = self.act(x)
        return y / self.scales


@torch.no_grad()
def fold(block: nn.Module, group: Group, scales: torch.Tensor) -> list[str]:
    """Scale the input of ``group`` by ``scales`` [K] in place; returns the parameters that were changed."""
    before = group.before
    if before is None:
        raise ValueError(f"{', '.join(group.linears)}: nothing to fold scales into")
    for name in group.consumers:
        block.get_parameter(name).mul_(scales)
    changed = list(group.consumers)
    if isinstance(before, Activation):
        block.set_submodule(before.path, ScaledActivation(block.get_submodule(before.path), scales.clone()))
        return [*changed, f"{before.path}.scales"]
    module = block.get_submodule(before.path)
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if isinstance(before, Norm):
        weight.add_(before.offset).div_(scales).sub_(before.offset)
        divisor = scales
    else:
        divisor = torch.ones(weight.shape[0], device=weight.device)
        divisor[before.rows.to(weight.device)] = scales
        weight.div_(divisor.unsqueeze(1))
    if isinstance(bias, torch.Tensor):
        bias.div_(divisor)
        changed.append(f"{before.path}.bias")
    return [*changed, f"{before.path}.weight"]
