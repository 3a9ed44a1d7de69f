"""The output embedding on a CPU: oneDNN's own order of a dense bfloat16 weight.

For few rows PyTorch's linear reads a plain [V, K] weight at half the speed of memory; oneDNN reads its own order at
full speed, and gives the same bits. The copy costs as much memory as the weight, so only small ones are made.
"""

from __future__ import annotations

import torch
from torch import nn

from .linears import Rows, bound

LARGEST = 512 << 20  # bytes of a weight that a copy is made of
MOST_ROWS = 16


def head_op(module: nn.Module, rows: int) -> Rows:
    """As ``bound``, over a copy in oneDNN's order where that is faster."""
    if type(module) is not nn.Linear or rows > MOST_ROWS or not _packable(module.weight):
        return bound(module, rows)
    bias, plain = module.bias, bound(module, rows)
    try:
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows)
        run = torch.ops.mkldnn._linear_pointwise.default
        probe = torch.ones(rows, module.in_features, dtype=module.weight.dtype)
        run(probe, packed, bias, "none", [], "")
    except (RuntimeError, AttributeError):  # a build of PyTorch without oneDNN, or a processor that it has no code for
        return plain
    return lambda x: run(x, packed, bias, "none", [], "")


def _packable(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() * weight.element_size() <= LARGEST
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )
