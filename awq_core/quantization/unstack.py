"""Stacked experts (3-D weights) as plain linears, so that everything else in this package sees linears only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

STACKS = ("gate_up_proj", "down_proj")


class Expert(nn.Module):
    """``down(act(gate(x)) * up(x))``, with weights [I, H], [I, H] and [H, I]."""

    def __init__(
        self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] to [T, H]."""
        y: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class UnstackedExperts(nn.Module):
    """The experts of one block, children ``0``, ``1``, ..., each run on the tokens that were sent to it.

    With ``every`` each expert runs on all tokens, so that one short run shows what each is connected to.
    """

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        self.every = False
        for number, (gate_up, down) in enumerate(zip(stacked.gate_up_proj, stacked.down_proj, strict=True)):
            self.add_module(str(number), Expert(gate_up, down, stacked.act_fn))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, top_k] to [T, H]."""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.children()):
            chosen = top_k_index == number
            if self.every:
                share = (top_k_weights * chosen).sum(1, keepdim=True)
                out = out + expert(hidden_states) * share.to(out.dtype)
                continue
            token, place = torch.where(chosen)
            if len(token):
                y = expert(hidden_states[token]) * top_k_weights[token, place, None]
                out.index_add_(0, token, y.to(out.dtype))
        return out


def unstack(block: nn.Module) -> list[str]:
    """Replace the stacked experts of ``block`` in place; returns the paths of those that are of another form."""
    strange = []
    for path, module in list(block.named_modules()):
        if not path or not all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in STACKS):
            continue
        if _plain(module):
            block.set_submodule(path, UnstackedExperts(module))
        else:
            strange.append(path)
    return strange


def _plain(module: Any) -> bool:
    """Whether they compute what ``Expert`` does, by transformers' own marks and by their shapes."""
    count, two_n, k = module.gate_up_proj.shape
    marks = {
        "is_transposed": False,
        "has_bias": False,
        "has_gate": True,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    alike = all(getattr(module, name, wanted) == wanted for name, wanted in marks.items())
    return alike and callable(getattr(module, "act_fn", None)) and module.down_proj.shape == (count, k, two_n // 2)


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return made
