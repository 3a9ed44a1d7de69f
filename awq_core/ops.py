"""The custom op ``awq_core::linear``: one opaque call in which a plan picks its kernel by M.

Dynamo sees one op with a fake and a gradient, never the branch. Eager inference calls the same function directly, since
the op's own dispatch costs more than a small kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .dispatch import Plan
from .explain import plan_line
from .kernel import Weight

_bound: dict[str, tuple[Plan, tuple[str, ...]]] = {}


def intern_plan(plan: Plan, names: tuple[str, ...]) -> str:
    """A key by which the op finds ``plan``; ``names`` are the resident tensors' names in the order they are passed.

    The key is made from what the plan is, so that a compiled graph that outlives this process finds the same plan.
    """
    key = f"{plan.spec}|{plan.resident.name}({','.join(names)})|{plan_line(plan)}"
    _bound[key] = (plan, names)
    return key


def apply_plan(plan: Plan, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] in the plan's dtype to y [M, N], by the kernel that the plan has for M."""
    m = x.shape[0]
    if m == 0:
        return x.new_empty(0, plan.spec.out_features)
    kernel = plan.kernel(m)
    if bias is None or kernel.adds_bias:
        return kernel.apply(weight, x, bias)
    return kernel.apply(weight, x, None).add_(bias)


@torch.library.custom_op("awq_core::linear", mutates_args=())
def awq_linear(x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None, key: str) -> torch.Tensor:
    """x [M, K] to y [M, N]; ``key`` as given by ``intern_plan``."""
    plan, names = _bound[key]
    weight = Weight(plan.spec, plan.resident, dict(zip(names, tensors, strict=True)))
    return apply_plan(plan, weight, x.contiguous(), bias)


@awq_linear.register_fake
def _(x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None, key: str) -> torch.Tensor:
    plan, _ = _bound[key]
    return x.new_empty(x.shape[0], plan.spec.out_features)


@torch.library.custom_op("awq_core::linear_backward", mutates_args=())
def awq_linear_backward(grad: torch.Tensor, tensors: list[torch.Tensor], key: str) -> torch.Tensor:
    """The gradient of x [M, K] from that of y [M, N]; the weight is dequantized, whatever kernel ran forward."""
    plan, names = _bound[key]
    weight = Weight(plan.spec, plan.resident, dict(zip(names, tensors, strict=True)))
    return grad @ weight.dequantize(grad.dtype).T


@awq_linear_backward.register_fake
def _(grad: torch.Tensor, tensors: list[torch.Tensor], key: str) -> torch.Tensor:
    plan, _ = _bound[key]
    return grad.new_empty(grad.shape[0], plan.spec.in_features)


def _setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: torch.Tensor) -> None:
    _, tensors, bias, key = inputs
    ctx.key, ctx.has_bias = key, bias is not None  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)  # type: ignore[misc]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[object, ...]:
    tensors = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    for_x = awq_linear_backward(grad, tensors, ctx.key) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
    for_bias = grad.sum(0) if ctx.has_bias else None  # type: ignore[attr-defined]
    return for_x, [None] * len(tensors), for_bias, None


awq_linear.register_autograd(_backward, setup_context=_setup)


def linear(
    plan: Plan,
    key: str,
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: Weight | None = None,
) -> torch.Tensor:
    """x [..., K] to y [..., N]: flattened to rows first, through the op where a graph or a gradient must see it.

    ``weight`` is the record of ``plan`` and ``tensors``, where there is one already.
    """
    shape = x.shape
    flat = len(shape) == 2
    rows = x if flat else x.reshape(-1, plan.spec.in_features)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling() or needs_grad or type(x) is not torch.Tensor:
        y: torch.Tensor = awq_linear(rows, list(tensors.values()), bias, key)
    else:
        weight = weight or Weight(plan.spec, plan.resident, tensors)
        y = apply_plan(plan, weight, rows.contiguous(), bias)
    return y if flat else y.view(*shape[:-1], plan.spec.out_features)
