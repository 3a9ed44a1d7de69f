"""Linears of a decoder as plain functions of rows: the kernel is chosen once, not in every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from awq_core.api import Weight
from awq_core.linear import AwqLinear

Rows = Callable[[torch.Tensor], torch.Tensor]


def bound(module: nn.Module, rows: int) -> Rows:
    """``module`` for x [rows, K], contiguous, to [rows, N]; a linear of a kind that we don't know is simply called."""
    if type(module).forward is AwqLinear.forward and isinstance(module, AwqLinear):
        return _awq(module, rows)
    if type(module) is nn.Linear:
        weight, bias = module.weight, module.bias
        return lambda x: F.linear(x, weight, bias)
    call: Rows = module.__call__
    return call


def joined(modules: tuple[nn.Module, ...], rows: int) -> Rows:
    """The outputs of all ``modules`` side by side."""
    if len(modules) == 1:
        return bound(modules[0], rows)
    parts = [bound(module, rows) for module in modules]
    return lambda x: torch.cat([part(x) for part in parts], dim=-1)


def _awq(module: AwqLinear, rows: int) -> Rows:
    state = module.weight_state
    if state.plan is None:
        module.bind()
    plan = state.plan
    if plan is None:  # on meta: the caller has refused such models
        call: Rows = module.__call__
        return call
    kernel = plan.kernel(rows)
    apply, weight, bias = kernel.apply, Weight(plan.spec, plan.resident, state.tensors()), module.bias
    if bias is None:
        return lambda x: apply(weight, x, None)
    if bias.dtype != module.dtype:
        bias = bias.to(module.dtype)
    if kernel.adds_bias:
        return lambda x: apply(weight, x, bias)
    return lambda x: apply(weight, x, None).add_(bias)
