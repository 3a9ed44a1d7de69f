"""``unpack_matmul``: many rows of activations on the bytes of ``cpu_int4pack``, through a dense bfloat16 matmul.

PyTorch's int4 kernel takes time in proportion to M; a dense bfloat16 matmul is far faster a row but needs a dense
weight. So the weight is made dense for one call, in a buffer that is used again and again, some columns at a time.
Each pass is one vectorized PyTorch operation over long rows, and the float32 numbers never leave the cache. The only
pass that moves short runs (half a block) is a copy of three dimensions, several times as fast as one of four.
"""

from __future__ import annotations

import torch

from awq_core.api import Weight

from . import int4pack
from .packing import Section, block_rows, sections
from .scratch import scratch

COLUMNS = 1 << 22  # weights in the dense buffer: 8 MiB
ROWS = 1 << 18  # weights in the float32 buffer: 1 MiB
HIGH_HALF = -(1 << 16)


def apply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x bfloat16 [M, K] to [M, N]; core adds the bias."""
    block = block_rows()
    if block is None:
        return int4pack.apply(weight, x, bias)
    packed, pairs = weight.tensors["packed"], weight.tensors["scale_and_zero"]
    out_features = packed.shape[0]
    y = x.new_empty(x.shape[0], out_features)
    for section in sections(out_features, block):
        step = max(1, COLUMNS // (x.shape[1] * block)) * block
        for first in range(section.first, section.last, step):
            piece = Section(first, min(first + step, section.last), section.run)
            columns = slice(piece.first, piece.last)
            torch.mm(x, dense_columns(piece, packed, pairs[:, columns]), out=y[:, columns])
    return y


def dense_columns(piece: Section, packed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The weight of the output rows of ``piece``, bfloat16 [K, n], in scratch; ``pairs`` are theirs, [G, n, 2]."""
    codes = _codes(piece, packed)
    in_features, n, groups = codes.shape[0], piece.last - piece.first, pairs.shape[0]
    scales, zero_terms = _spread(pairs)
    dense = scratch("dense", (in_features, n), torch.bfloat16)
    size = in_features // groups
    step = max(1, ROWS // (size * n))
    for first in range(0, groups, step):
        last = min(first + step, groups)
        rows = slice(first * size, last * size)
        weight = scratch("weight", (last - first, size, n), torch.float32)
        weight.view(-1, *codes.shape[1:]).copy_(codes[rows])
        torch.addcmul(zero_terms[first:last], weight, scales[first:last], out=weight)
        dense[rows].copy_(weight.view(-1, n))
    return dense


def _codes(piece: Section, packed: torch.Tensor) -> torch.Tensor:
    """The codes in scratch, uint8, as a view [K, ...] whose other dimensions are the columns in order."""
    stored = piece.bytes_of(packed)
    blocks, in_features, run = stored.shape
    if piece.tail:
        codes = scratch("codes", (in_features, run, 2), torch.uint8)
        low, high, ordered = codes[None, ..., 0], codes[None, ..., 1], codes.view(in_features, -1)
    else:
        codes = scratch("codes", (blocks, 2, in_features, run), torch.uint8)
        low, high, ordered = codes[:, 0], codes[:, 1], codes.view(-1, in_features, run).transpose(0, 1)
    torch.bitwise_and(stored, 15, out=low)
    torch.bitwise_right_shift(stored, 4, out=high)
    return ordered


def _spread(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs [G, n, 2] to ``s`` and ``t``, float32 [G, 1, n], of ``w = code * s + t``.

    A bfloat16 is the high half of a float32, and a pair is one 32-bit word: two integer operations spread it.
    """
    groups, n, _ = pairs.shape
    words = pairs.view(torch.int32).view(groups, 1, n)
    scales = scratch("scales", (groups, 1, n), torch.float32)
    zero_terms = scratch("zero_terms", (groups, 1, n), torch.float32)
    torch.bitwise_left_shift(words, 16, out=scales.view(torch.int32))
    torch.bitwise_and(words, HIGH_HALF, out=zero_terms.view(torch.int32))
    return scales, zero_terms.sub_(scales, alpha=8)
