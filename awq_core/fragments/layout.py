"""Packing ``awq_fragments`` (described in this package's docstring) and back, on the tensors' device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812

from ..layouts import checkpoint_layout
from ..layouts.base import Codes
from ..layouts.base import dequantize as dequantize_codes
from ..spec import LinearSpec

BLOCK, COLUMNS, WORDS = 128, 16, 256


def nbytes(spec: LinearSpec) -> int:
    """Bytes of the resident tensors, with scales of 16 bits."""
    words = math.ceil(spec.out_features / COLUMNS) * math.ceil(spec.in_features / BLOCK) * WORDS
    groups = spec.groups * (2 * spec.out_features + 4 * math.ceil(spec.out_features / 8))
    return (4 * words + groups) * max(1, spec.experts)


def prepare(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors to ``words``, ``zeros`` and ``scales``."""
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
    """The dense weight [K, N] of one linear, with torch alone."""
    return dequantize_codes(codes_of(spec, tensors), dtype)


def codes_of(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Codes:
    """Codes [K, N], zero points [K/g, N] and scales."""
    n, b = tensors["words"].shape[:2]
    words = tensors["words"].reshape(n, b, 2, 8, 4, 2, 2)  # n, b, c, g, t, h, p
    codes = torch.empty(b, 8, 2, 4, 2, n, 2, 8, dtype=torch.uint8, device=words.device)  # b, j, c, t, i, n, h, g
    for plane in range(8):
        for i in range(2):
            nibbles = (words[..., plane // 4] >> (4 * (plane % 4) + 16 * i)) & 15
            codes[:, plane, :, :, i] = nibbles.permute(1, 2, 4, 0, 5, 3)
    zeros = torch.stack([(tensors["zeros"] >> (4 * i)) & 15 for i in range(8)], -1).flatten(1).to(torch.uint8)
    k, columns = spec.in_features, spec.out_features
    return Codes(codes.view(b * BLOCK, -1)[:k, :columns], zeros[:, :columns], tensors["scales"])


def _prepare(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    k, n = spec.in_features, spec.out_features
    found = checkpoint_layout(spec.layout).unpack(tensors, k, n, spec.group_size)
    codes = F.pad(found.codes, (0, -n % COLUMNS, 0, -k % BLOCK))
    codes = codes.view(-1, 8, 2, 4, 2, math.ceil(n / COLUMNS), 2, 8)  # b, j, c, t, i, n, h, g
    words = torch.zeros(codes.shape[5], codes.shape[0], 2, 8, 4, 2, 2, dtype=torch.int32, device=codes.device)
    for plane in range(8):
        for i in range(2):
            part = codes[:, plane, :, :, i].permute(3, 0, 1, 5, 2, 4).to(torch.int32)  # n, b, c, g, t, h
            words[..., plane // 4] |= part << (4 * (plane % 4) + 16 * i)
    zeros = F.pad(found.zeros, (0, -n % 8)).to(torch.int32).reshape(spec.groups, -1, 8)
    packed = zeros[..., 0].clone()
    for i in range(1, 8):
        packed |= zeros[..., i] << (4 * i)
    return {
        "words": words.flatten(2),
        "zeros": packed,
        "scales": found.scales.clone(memory_format=torch.contiguous_format),
    }


def _restore(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return checkpoint_layout(spec.layout).pack(codes_of(spec, tensors))
