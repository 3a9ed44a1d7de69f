"""``unpack_matmul``: many rows of activations on the bytes of ``cpu_int4pack``, through a dense bfloat16 matmul.

PyTorch's int4 kernel takes time in proportion to M; a dense bfloat16 matmul is far faster a row but needs a dense
weight. So the weight is made dense for one call, some columns at a time, in buffers that are used again and again;
in float32 where the processor has no bfloat16 instructions, because there the float32 matmul is the fast one.
Each pass is one vectorized PyTorch operation over long rows. The only one that moves short runs (half a block) is a
copy of three dimensions, several times as fast as the same one of four; it also widens the codes to float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from awq_core.api import Weight

from . import int4pack
from .isa import fast_bfloat16
from .packing import Section, block_rows, sections
from .scratch import scratch, views

PIECE = 1 << 20  # weights that are made dense at once: 4 MiB in float32, 2 MiB in bfloat16
ROWS = 1024  # rows of a float32 product that are held at once
HIGH_HALF = -(1 << 16)


class Buffers(NamedTuple):
    """Views of one thread's scratch for pieces of one shape; making them anew costs as much as a pass."""

    low: torch.Tensor  # the codes of the low halves, uint8, shaped as the piece's bytes
    high: torch.Tensor
    ordered: torch.Tensor  # all codes, uint8 [K, ...], the other dimensions are the columns in order
    widened: torch.Tensor  # ``weight``, shaped as ``ordered``
    scale_words: torch.Tensor  # ``scales`` as int32
    zero_words: torch.Tensor
    scales: torch.Tensor  # float32 [G, 1, n]
    zero_terms: torch.Tensor
    grouped: torch.Tensor  # ``weight`` as [G, K/G, n]
    weight: torch.Tensor  # float32 [K, n]


def apply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x bfloat16 [M, K] to [M, N]; core adds the bias."""
    block = block_rows()
    if block is None:
        return int4pack.apply(weight, x, bias)
    packed, pairs = weight.tensors["packed"], weight.tensors["scale_and_zero"]
    pieces = _pieces(packed.shape[0], x.shape[1], block, PIECE)
    if not fast_bfloat16():
        return _wide(pieces, packed, pairs, x)
    if len(pieces) == 1:
        return torch.mm(x, _rounded(dense_columns(pieces[0], packed, pairs)))
    y = x.new_empty(x.shape[0], packed.shape[0])
    for piece in pieces:
        columns = slice(piece.first, piece.last)
        torch.mm(x, _rounded(dense_columns(piece, packed, pairs[:, columns])), out=y[:, columns])
    return y


def _wide(pieces: tuple[Section, ...], packed: torch.Tensor, pairs: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same product in float32, rounded once at the end."""
    y, wide = x.new_empty(x.shape[0], packed.shape[0]), x.float()
    for piece in pieces:
        columns = slice(piece.first, piece.last)
        weight = dense_columns(piece, packed, pairs[:, columns])
        for first in range(0, x.shape[0], ROWS):
            some = wide[first : first + ROWS]
            product = scratch("product", (some.shape[0], weight.shape[1]), torch.float32)
            y[first : first + ROWS, columns] = torch.mm(some, weight, out=product)
    return y


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    return scratch("dense", tuple(weight.shape), torch.bfloat16).copy_(weight)


def dense_columns(piece: Section, packed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The weight of the output rows of ``piece``, float32 [K, n], in scratch; ``pairs`` are theirs, [G, n, 2].

    ``w = (code - 8) * scale + zero_term``. A bfloat16 is the high half of a float32, and a pair is one 32-bit word: two
    integer operations spread it.
    """
    stored = piece.bytes_of(packed)
    groups, n, _ = pairs.shape
    shape = (stored.shape[1], n, groups, piece.run)
    b = views(shape, lambda: _buffers(*shape))
    torch.bitwise_and(stored, 15, out=b.low)
    torch.bitwise_right_shift(stored, 4, out=b.high)
    b.widened.copy_(b.ordered)
    words = pairs.view(torch.int32).view(groups, 1, n)
    torch.bitwise_left_shift(words, 16, out=b.scale_words)
    torch.bitwise_and(words, HIGH_HALF, out=b.zero_words)
    b.zero_terms.sub_(b.scales, alpha=8)
    torch.addcmul(b.zero_terms, b.grouped, b.scales, out=b.grouped)
    return b.weight


@functools.lru_cache(maxsize=256)
def _pieces(out_features: int, in_features: int, block: int, size: int) -> tuple[Section, ...]:
    """The sections, cut into pieces of about ``size`` weights and of whole blocks."""
    step = max(1, size // (in_features * block)) * block
    return tuple(
        Section(first, min(first + step, section.last), section.run)
        for section in sections(out_features, block)
        for first in range(section.first, section.last, step)
    )


def _buffers(in_features: int, n: int, groups: int, run: int) -> Buffers:
    if run == 1:  # the tail: neighbours share a byte
        codes = scratch("codes", (1, in_features, n // 2, 2), torch.uint8)
        low, high, ordered = codes[..., 0], codes[..., 1], codes.view(in_features, n)
    else:
        codes = scratch("codes", (n // (2 * run), 2, in_features, run), torch.uint8)
        low, high, ordered = codes[:, 0], codes[:, 1], codes.view(-1, in_features, run).transpose(0, 1)
    weight = scratch("weight", (in_features, n), torch.float32)
    scales = scratch("scales", (groups, 1, n), torch.float32)
    zero_terms = scratch("zero_terms", (groups, 1, n), torch.float32)
    return Buffers(
        low,
        high,
        ordered,
        weight.view(ordered.shape),
        scales.view(torch.int32),
        zero_terms.view(torch.int32),
        scales,
        zero_terms,
        weight.view(groups, -1, n),
        weight,
    )
