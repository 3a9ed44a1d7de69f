"""Linears of a decoder as plain functions of rows: the kernel is chosen once, not in every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from awq_core.api import Kernel, Normed, Weight
from awq_core.linear import AwqLinear

Rows = Callable[[torch.Tensor], torch.Tensor]


def bound(module: nn.Module, rows: int) -> Rows:
    """``module`` for x [rows, K], contiguous, to [rows, N]; a linear of a kind that we don't know is simply called."""
    if _ours(module):
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


def epilogue(modules: tuple[nn.Module, ...], rows: int, name: str) -> Callable[..., torch.Tensor] | None:
    """The variant ``name`` (``Kernel.epilogues``) of one linear without a bias; None where it has none."""
    module = modules[0]
    if len(modules) > 1 or not _ours(module) or module.bias is not None:
        return None
    return _variant(module, rows, name)


def normed(modules: tuple[nn.Module, ...]) -> Callable[[Normed], torch.Tensor] | None:
    """One linear that makes its row itself, with or without a bias; None where it cannot."""
    module = modules[0]
    if len(modules) > 1 or not _ours(module):
        return None
    variant, bias = _variant(module, 1, "norm"), module.bias
    if variant is None:
        return None
    if bias is not None and bias.dtype != module.dtype:
        bias = bias.to(module.dtype)
    return lambda row: variant(row, bias)


def _variant(module: AwqLinear, rows: int, name: str) -> Callable[..., torch.Tensor] | None:
    found = _kernel(module, rows)
    if found is None or name not in found[0].epilogues:
        return None
    return partial(found[0].epilogues[name], found[1])


def _ours(module: nn.Module) -> TypeGuard[AwqLinear]:
    """Whether it is a linear of ours whose ``forward`` nobody has replaced."""
    return isinstance(module, AwqLinear) and type(module).forward is AwqLinear.forward


def _kernel(module: AwqLinear, rows: int) -> tuple[Kernel, Weight] | None:
    """The kernel for so many rows and what it reads; None on meta: the caller has refused such models."""
    state = module.weight_state
    if state.plan is None:
        module.bind()
    plan = state.plan
    return None if plan is None else (plan.kernel(rows), Weight(plan.spec, plan.resident, state.tensors()))


def _awq(module: AwqLinear, rows: int) -> Rows:
    found = _kernel(module, rows)
    if found is None:
        call: Rows = module.__call__
        return call
    (kernel, weight), bias = found, module.bias
    apply = kernel.apply
    if bias is None:
        return lambda x: apply(weight, x, None)
    if bias.dtype != module.dtype:
        bias = bias.to(module.dtype)
    if kernel.adds_bias:
        return lambda x: apply(weight, x, bias)
    return lambda x: apply(weight, x, None).add_(bias)
