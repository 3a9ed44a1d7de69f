"""Packing ``awq_words`` (described in this package's docstring) and back, on the tensors' device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ..layouts import checkpoint_layout
from ..layouts.base import Codes
from ..layouts.base import dequantize as dequantize_codes
from ..spec import LinearSpec

NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the code of k = 8w + i stands

Tensors = Mapping[str, torch.Tensor]


def prepare(spec: LinearSpec, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Checkpoint tensors to ``words``, ``zeros`` and ``scales``."""
    return _each_expert(_prepare, spec, tensors)


def restore(spec: LinearSpec, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The checkpoint tensors, bit for bit."""
    return _each_expert(_restore, spec, tensors)


def dequantize(spec: LinearSpec, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N]; on a GPU in float16 or bfloat16 by a kernel."""
    if tensors["words"].is_cuda and dtype in (torch.float16, torch.bfloat16):
        from . import launch

        return launch.dequantize(spec, tensors, dtype)
    return dequantize_codes(_codes(spec, tensors), dtype)


def _each_expert(
    convert: Callable[[LinearSpec, Tensors], dict[str, torch.Tensor]], spec: LinearSpec, tensors: Tensors
) -> dict[str, torch.Tensor]:
    if not spec.experts:
        return convert(spec, tensors)
    each = [convert(spec, {name: t[i] for name, t in tensors.items()}) for i in range(spec.experts)]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def _prepare(spec: LinearSpec, tensors: Tensors) -> dict[str, torch.Tensor]:
    codes = checkpoint_layout(spec.layout).unpack(tensors, spec.in_features, spec.out_features, spec.group_size)
    rows = codes.codes.view(-1, len(NIBBLES), spec.out_features)
    words = torch.zeros(rows.shape[0], spec.out_features, dtype=torch.int32, device=rows.device)
    for i, nibble in enumerate(NIBBLES):
        words |= rows[:, i].to(torch.int32) << (4 * nibble)
    zeros = codes.zeros if codes.scaled_zeros is None else codes.scaled_zeros
    return {"words": words, "zeros": _copy(zeros), "scales": _copy(codes.scales)}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _codes(spec: LinearSpec, tensors: Tensors) -> Codes:
    words, zeros = tensors["words"], tensors["zeros"]
    codes = torch.empty(words.shape[0], len(NIBBLES), spec.out_features, dtype=torch.uint8, device=words.device)
    for i, nibble in enumerate(NIBBLES):
        codes[:, i] = (words >> (4 * nibble)) & 15
    scaled = zeros if zeros.is_floating_point() else None
    integers = zeros if scaled is None else torch.zeros_like(zeros, dtype=torch.uint8)  # beside scaled ones unused
    return Codes(codes.view(-1, spec.out_features), integers, tensors["scales"], scaled)


def _restore(spec: LinearSpec, tensors: Tensors) -> dict[str, torch.Tensor]:
    return checkpoint_layout(spec.layout).pack(_codes(spec, tensors))
