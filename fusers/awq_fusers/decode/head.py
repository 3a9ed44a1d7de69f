"""The output embedding on a CPU: a copy of its weight in the form that the processor reads fastest.

* For few rows PyTorch's linear reads a plain bfloat16 [V, K] weight at half the speed of memory; oneDNN reads its own
  order at full speed, and gives the same bits. The copy costs as much memory as the weight: only small ones are made.
* Where the user asked for it (``int8_head``): 8 bits a weight and a scale a row. It reads half the bytes, and changes
  the logits a little.
"""

from __future__ import annotations

import torch
from torch import nn

from .linears import Rows, bound

LARGEST = 512 << 20  # bytes of a weight that a copy is made of without being asked
MOST_ROWS = 16
PART = 4096  # rows that are quantized at once
INT8_ROWS = 4  # the most rows for which PyTorch's int8 kernel is the faster one


def head_op(module: nn.Module, rows: int, int8: bool = False) -> Rows:
    """As ``bound``, over a copy where that is faster."""
    if int8 and rows <= INT8_ROWS and takes_int8(module):
        return _int8(module)
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


def takes_int8(module: nn.Module) -> bool:
    """Whether this head may be read in 8 bits: a plain bfloat16 linear on a CPU, where PyTorch has a fast kernel."""
    return type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.bfloat16


def quantized_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[V, K] to int8 [V, K] and bfloat16 scales [V]; ``codes * scales[:, None]`` is near the weight."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = (weight.abs().amax(-1).float() / 127).clamp_min_(1e-30).to(torch.bfloat16)
    for first in range(0, len(weight), PART):
        part, scale = weight[first : first + PART], scales[first : first + PART, None]
        codes[first : first + PART] = (part.float() / scale.float()).round_().clamp_(-127, 127)
    return codes, scales


def _int8(module: nn.Module) -> Rows:
    with torch.inference_mode(False), torch.no_grad():
        codes, scales = quantized_rows(module.weight.detach())  # type: ignore[operator]
    run, bias = torch.ops.aten._weight_int8pack_mm.default, module.bias
    if bias is None:
        return lambda x: run(x, codes, scales)
    return lambda x: run(x, codes, scales).add_(bias)


def _packable(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.numel() * weight.element_size() <= LARGEST
        and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    )
