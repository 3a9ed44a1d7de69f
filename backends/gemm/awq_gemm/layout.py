"""``awq_planes``: the resident layout of the GPU kernels, for decoding and for prefill alike.

* ``planes`` int32 [ceil(K/128) * 16, N]: word ``16 * b + r`` of a column holds the eight codes of
  ``k = 128 * b + 16 * j + r``, j = 0..7: each plane j of a block is a run of 16 consecutive k, so that activations are
  read in order, and a plane never spans two groups (g is a multiple of 16). Rows past K hold zeros.
* ``zeros`` uint8 [K/g, N], ``scales`` [K/g, N] as stored.

Plane j stands at nibble ``j // 2 + 4 * (j % 2)`` of the word: two planes lie 16 bits apart, so that one ``lop3`` turns
them into a pair of float16 numbers.

With experts each tensor has a leading dimension E.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from awq_core.api import Codes, LinearSpec, checkpoint_layout
from awq_core.api import dequantize as dequantize_codes

BLOCK, RUN, PLANES = 128, 16, 8


def nibble(plane: int) -> int:
    """Where plane j stands in its word."""
    return plane // 2 + 4 * (plane % 2)


def prepare(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors to ``planes``, ``zeros`` and ``scales``, on their device."""
    if spec.experts:
        each = [_prepare(spec, {name: t[i] for name, t in tensors.items()}) for i in range(spec.experts)]
        return {name: torch.stack([e[name] for e in each]) for name in each[0]}
    return _prepare(spec, tensors)


def restore(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint tensors, bit for bit."""
    if spec.experts:
        each = [_restore(spec, {name: t[i] for name, t in tensors.items()}) for i in range(spec.experts)]
        return {name: torch.stack([e[name] for e in each]) for name in each[0]}
    return _restore(spec, tensors)


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N]; on a GPU in float16 or bfloat16 by a kernel that runs at the speed of memory."""
    if tensors["planes"].is_cuda and dtype in (torch.float16, torch.bfloat16):
        from . import launch

        return launch.dequantize(spec, tensors, dtype)
    return dequantize_codes(_codes(spec, tensors), dtype)


def _prepare(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    codes = checkpoint_layout(spec.layout).unpack(tensors, spec.in_features, spec.out_features, spec.group_size)
    padding = -spec.in_features % BLOCK
    rows = torch.nn.functional.pad(codes.codes, (0, 0, 0, padding)).view(-1, PLANES, RUN, spec.out_features)
    planes = torch.zeros(rows.shape[0], RUN, spec.out_features, dtype=torch.int32, device=rows.device)
    for plane in range(PLANES):
        planes |= rows[:, plane].to(torch.int32) << (4 * nibble(plane))
    return {
        "planes": planes.view(-1, spec.out_features),
        "zeros": codes.zeros.contiguous(),
        "scales": codes.scales.clone(memory_format=torch.contiguous_format),
    }


def _codes(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Codes:
    planes = tensors["planes"].view(-1, RUN, spec.out_features)
    codes = torch.empty(planes.shape[0], PLANES, RUN, spec.out_features, dtype=torch.uint8, device=planes.device)
    for plane in range(PLANES):
        codes[:, plane] = (planes >> (4 * nibble(plane))) & 15
    return Codes(codes.view(-1, spec.out_features)[: spec.in_features], tensors["zeros"], tensors["scales"])


def _restore(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return checkpoint_layout(spec.layout).pack(_codes(spec, tensors))
