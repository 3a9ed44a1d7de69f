"""The bytes that PyTorch's int4 kernel reads, and the ways to and from them.

``packed`` is uint8 [N, K/2], but a row of it is no row of the weight. The N output rows are cut into blocks of B rows
(B is 64 on AVX512, 32 on AVX2); a block lies as bytes [K, B/2], and byte j of row k holds output row j of the block
in its low half and output row j + B/2 in its high half, both of input k. What remains (N % B rows, a multiple of 16)
lies as bytes [K, rows/2], and byte j holds the output rows 2j and 2j + 1.

PyTorch documents none of this, so ``block_rows`` looks at what its converter really does here; where that is something
else, the converter packs and the int4 kernel itself reads back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .scratch import scratch

CONVERT = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
MATMUL = torch.ops.aten._weight_int4pack_mm_for_cpu.default

BLOCKS = (64, 32)
CHUNK_WORDS = 1 << 19  # int32 words that are permuted at once: 2 MiB, so that the buffers stay in the cache
IDENTITY_ROWS = 256


@dataclass(frozen=True, slots=True)
class Section:
    """Output rows ``first`` to ``last`` (left out) that are laid out alike.

    Their bytes are [blocks, K, run] (``tail``: [K, blocks] with run 1): the low half of byte j is row j of a block,
    the high half row ``run + j``.
    """

    first: int
    last: int
    run: int

    @property
    def tail(self) -> bool:
        """Whether these are the rows behind the last whole block."""
        return self.run == 1

    def bytes_of(self, packed: torch.Tensor) -> torch.Tensor:
        """The section's bytes as a view, [blocks, K, run], or [1, K, rows/2] for the tail."""
        in_features = 2 * packed.shape[1]
        rows = packed[self.first : self.last]
        return rows.view(1, in_features, -1) if self.tail else rows.view(-1, in_features, self.run)


def sections(out_features: int, block: int) -> Iterator[Section]:
    """The whole blocks and the tail, where there are any."""
    whole = out_features - out_features % block
    if whole:
        yield Section(0, whole, block // 2)
    if whole < out_features:
        yield Section(whole, out_features, 1)


@functools.cache
def block_rows() -> int | None:
    """B on this machine with this PyTorch; None if its packing is not the one that this file describes."""
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(112 * 32).view(32, 112)  # 112 rows: a tail for either B
        codes = ((index * 2654435761) >> 9 & 15).to(torch.uint8)
        packed = CONVERT(codes.t().to(torch.int32).contiguous(), 1)
        return next((b for b in BLOCKS if torch.equal(_pack_blocks(codes, b), packed)), None)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [K, N], N a multiple of 16, to packed uint8 [N, K/2]."""
    block = block_rows()
    if block is None:
        packed: torch.Tensor = CONVERT(codes.t().to(torch.int32).contiguous(), 1)
        return packed
    return _pack_blocks(codes, block)


def _pack_blocks(codes: torch.Tensor, block: int) -> torch.Tensor:
    in_features, out_features = codes.shape
    packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
    for section in sections(out_features, block):
        halves = codes[:, section.first : section.last].view(in_features, -1, 2, section.run)
        joined = (halves[:, :, 1] << 4).bitwise_or_(halves[:, :, 0])  # [K, blocks, run]
        section.bytes_of(packed).copy_(joined.view(1, in_features, -1) if section.tail else joined.transpose(0, 1))
    return packed


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_codes``: packed uint8 [N, K/2] to codes uint8 [K, N]."""
    block = block_rows()
    if block is None:
        return _read_by_matmul(packed)
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    codes = torch.empty(in_features, out_features, dtype=torch.uint8)
    for section in sections(out_features, block):
        stored = section.bytes_of(packed)
        joined = stored.view(in_features, -1, 1) if section.tail else stored.transpose(0, 1)
        halves = codes[:, section.first : section.last].view(in_features, -1, 2, section.run)
        torch.bitwise_and(joined, 15, out=halves[:, :, 0])
        torch.bitwise_right_shift(joined, 4, out=halves[:, :, 1])
    return codes


def _read_by_matmul(packed: torch.Tensor) -> torch.Tensor:
    """The codes as the product of an identity matrix with scale 1 and zero point 0: exact in bfloat16, but slow."""
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    scale_and_zero = torch.tensor([1.0, 8.0], dtype=torch.bfloat16).expand(in_features // 32, out_features, 2)
    codes = torch.empty(in_features, out_features, dtype=torch.uint8)
    for first in range(0, in_features, IDENTITY_ROWS):
        rows = torch.zeros(min(IDENTITY_ROWS, in_features - first), in_features, dtype=torch.bfloat16)
        rows.diagonal(first).fill_(1.0)
        codes[first : first + len(rows)] = MATMUL(rows, packed, 32, scale_and_zero.contiguous()).to(torch.uint8)
    return codes


# The fast way from the gemm layout permutes nibbles inside int32 words, so that no code ever takes a byte of its own.
# In a gemm word the columns 0..7 lie at the nibbles 0, 4, 1, 5, 2, 6, 3, 7. A stands for a word of the first half of a
# block's columns and B for the word B/16 behind it; _swap exchanges two sets of nibbles (a delta swap).


def pack_gemm_words(words: torch.Tensor) -> torch.Tensor:
    """``qweight`` int32 [K, N/8] of the gemm layout, N a multiple of 16, to packed uint8 [N, K/2]."""
    in_features, out_features = words.shape[0], 8 * words.shape[1]
    block = block_rows()
    if block is None:
        return pack_codes(gemm_columns(words))
    packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8)
    for section in sections(out_features, block):
        columns = words[:, section.first // 8 : section.last // 8]
        if section.tail:
            ordered = columns.clone(memory_format=torch.contiguous_format)
            _swap(ordered, ordered, 8, 0x0000FF00, torch.empty_like(ordered))
            _swap(ordered, ordered, 4, 0x00F000F0, torch.empty_like(ordered))
            section.bytes_of(packed).copy_(ordered.view(torch.uint8).unsqueeze(0))
        else:
            _pack_whole_blocks(columns, section, packed)
    return packed


def _pack_whole_blocks(columns: torch.Tensor, section: Section, packed: torch.Tensor) -> None:
    in_features, per_row = columns.shape
    half = section.run // 8  # words of half a block: 4 or 2, moved as one element
    element = torch.complex128 if half == 4 else torch.int64
    if columns.stride(0) % half or columns.storage_offset() % half or columns.stride(1) != 1:
        columns = columns.clone(memory_format=torch.contiguous_format)
    source = columns.view(element).view(in_features, -1, 2)
    blocks = source.shape[1]
    target = section.bytes_of(packed).view(torch.int32).view(blocks, in_features, half, 2)
    step = max(1, min(in_features, CHUNK_WORDS // per_row))
    for first in range(0, in_features, step):
        count = min(step, in_features - first)
        planes = scratch("planes", (2, blocks, count, half), torch.int32)
        spare = scratch("spare", (2, blocks, count, half), torch.int32)
        planes.view(element).squeeze(-1).copy_(source[first : first + count].permute(2, 1, 0))
        _swap(planes[0], planes[1], 8, 0x00FF00FF, spare[0])  # words of columns 0-3 (A B A B bytes), and of 4-7
        _swap(planes, planes, 4, 0x00F000F0, spare)
        _swap(planes, planes, 8, 0x0000FF00, spare)
        for side in (0, 1):
            target[:, first : first + count, :, side].copy_(planes[side])


def _swap(a: torch.Tensor, b: torch.Tensor, shift: int, mask: int, spare: torch.Tensor) -> None:
    """Exchange, in place, the bits ``mask`` of ``b`` with the bits ``mask << shift`` of ``a``."""
    torch.bitwise_right_shift(a, shift, out=spare)  # arithmetic: the mask drops the copies of the sign
    spare.bitwise_xor_(b).bitwise_and_(mask)
    if a is b:  # both sets of bits at once: they do not overlap, so the product has no carries
        a.bitwise_xor_(spare.mul_(1 + (1 << shift)))
        return
    b.bitwise_xor_(spare)
    a.bitwise_xor_(spare.bitwise_left_shift_(shift))


def gemm_columns(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [R, C] of the gemm layout (qweight or qzeros) to their values, uint8 [R, 8C]."""
    rows = words.shape[0]
    pairs = words.contiguous().view(torch.uint8).view(rows, -1, 2, 2)  # nibble 4h + 2i + j is column 4i + 2j + h
    columns = torch.empty(rows, pairs.shape[1], 2, 2, 2, dtype=torch.uint8)  # [R, C, i, j, h]
    torch.bitwise_and(pairs.transpose(2, 3), 15, out=columns[:, :, :, 0])
    torch.bitwise_right_shift(pairs.transpose(2, 3), 4, out=columns[:, :, :, 1])
    return columns.view(rows, -1)
