"""``cpu_dense``: a dense copy of the weight beside the checkpoint tensors, for what PyTorch's int4 kernel is slow at.

* ``dense`` [N, K] in the activations' dtype, the form that ``F.linear`` reads
* the checkpoint tensors as they are stored

With experts every tensor has a leading dimension E.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from awq_core.api import LinearSpec, Weight, checkpoint_layout
from awq_core.api import dequantize as dense_of

from .isa import fast_bfloat16
from .scratch import scratch

DENSE = "dense"


FEW_ROWS = 8  # up to here PyTorch's own matmul of 16-bit numbers is the faster one
PIECE = 1 << 18  # weights that are widened at once: 1 MiB


def apply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear``: x [M, K] to [M, N], bias [N] or None."""
    dense = weight.tensors[DENSE]
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not fast_bfloat16())
    if slow and x.shape[0] > FEW_ROWS:
        return _widened(dense, x, bias)
    return torch.nn.functional.linear(x, dense, bias)


def _widened(dense: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in float32, a piece of the weight at a time: many rows in 16 bits are several times slower."""
    out_features, in_features = dense.shape
    wide, y = x.float(), x.new_empty(x.shape[0], out_features)
    step = max(1, PIECE // in_features)
    for first in range(0, out_features, step):
        piece = dense[first : first + step]
        weight = scratch("widened", tuple(piece.shape), torch.float32).copy_(piece)
        y[:, first : first + step] = torch.nn.functional.linear(wide, weight)
    return y if bias is None else y.add_(bias)


def prepare(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors to resident tensors; the former are kept, not copied."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if not spec.experts:
        return {DENSE: _of_checkpoint(spec, tensors, dtype).t().contiguous(), **tensors}
    dense = torch.empty(spec.experts, spec.out_features, spec.in_features, dtype=dtype)
    for i in range(spec.experts):
        dense[i] = _of_checkpoint(spec, {name: t[i] for name, t in tensors.items()}, dtype).t()
    return {DENSE: dense, **tensors}


def restore(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint tensors, which were kept."""
    return {name: tensor for name, tensor in tensors.items() if name != DENSE}


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N]: computed from the codes, so that it is rounded once to any ``dtype``."""
    kept = tensors[DENSE]
    return kept.t().to(dtype) if kept.dtype in (dtype, torch.float32) else _of_checkpoint(spec, tensors, dtype)


def _of_checkpoint(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    layout = checkpoint_layout(spec.layout)
    return dense_of(layout.unpack(tensors, spec.in_features, spec.out_features, spec.group_size), dtype)
