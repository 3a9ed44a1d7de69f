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
from typing import Any

import numpy as np
import torch

from .scratch import scratch

CONVERT = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
MATMUL = torch._weight_int4pack_mm_for_cpu  # torch.ops.aten's callable of it takes a microsecond longer

BLOCKS = (64, 32)
# int32 words that are permuted at once, 1 MiB. Less would stay in a core's own cache and is faster for one thread, but
# where two pack at a time, each call of numpy may have to wait for the interpreter.
CHUNK_WORDS = 1 << 18
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
        _pack_section(codes[:, section.first : section.last], section, packed)
    return packed


def _pack_section(codes: torch.Tensor, section: Section, packed: torch.Tensor) -> None:
    """Write the bytes of ``codes`` [K, rows], the columns of ``section``."""
    in_features = codes.shape[0]
    halves = codes.view(in_features, -1, 2, section.run)
    joined = (halves[:, :, 1] << 4).bitwise_or_(halves[:, :, 0])  # [K, blocks, run]
    section.bytes_of(packed).copy_(joined.view(1, in_features, -1) if section.tail else joined.transpose(0, 1))


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


# The fast way from the gemm layout permutes nibbles inside 32-bit words, so that no code ever takes a byte of its own.
# Take A, a word of the first half of a block's columns, and B, the word half a block behind it, and give each of their
# 16 nibbles an address of four bits: "is in B", then its place in the word. Column c lies at the place (c0, c2, c1),
# where c0 is the lowest bit of c. The two words of bytes that are wanted have, as "is in the second", c2, and as the
# place (c1, c0, is in B). This permutation of address bits is one cycle, and three exchanges of the first bit with one
# of the others make it. Each is a delta swap between the two words, in which nothing moves inside a word.
# With numpy, since these are many short operations: a call costs it less than PyTorch, and it starts no threads.

EXCHANGES = tuple((np.uint32(shift), np.uint32(mask)) for shift, mask in ((4, 0x0F0F0F0F), (16, 0xFFFF), (8, 0xFF00FF)))


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
            _pack_section(gemm_columns(columns), section, packed)
        else:
            _pack_whole_blocks(columns, section, packed)
    return packed


def _pack_whole_blocks(columns: torch.Tensor, section: Section, packed: torch.Tensor) -> None:
    in_features, per_row = columns.shape
    half = section.run // 8  # words of half a block: 4 or 2, moved as one element
    element = np.complex128 if half == 4 else np.uint64
    if columns.stride(1) != 1:
        columns = columns.contiguous()
    source = columns.numpy().view(element).reshape(in_features, -1, 2)
    blocks = source.shape[1]
    target = section.bytes_of(packed).numpy().view(np.uint32).reshape(blocks, in_features, half, 2)
    step = max(1, min(in_features, CHUNK_WORDS // per_row))
    held = scratch("words", (3, blocks * step * half), torch.int32).numpy().view(np.uint32)
    for first in range(0, in_features, step):
        rows = slice(first, min(first + step, in_features))
        count = rows.stop - first
        a, b, spare = (buffer[: blocks * count * half].reshape(blocks, count, half) for buffer in held)
        np.copyto(a.view(element)[..., 0], source[rows, :, 0].T)
        np.copyto(b.view(element)[..., 0], source[rows, :, 1].T)
        for exchange in EXCHANGES[:2]:
            _exchange(a, b, exchange, spare, a, b)
        _exchange(a, b, EXCHANGES[2], spare, target[:, rows, :, 0], target[:, rows, :, 1])


def _exchange(a: Any, b: Any, exchange: tuple[Any, Any], spare: Any, new_a: Any, new_b: Any) -> None:
    """Exchange the bits ``mask`` of ``b`` with the bits ``mask << shift`` of ``a``."""
    shift, mask = exchange
    np.right_shift(a, shift, out=spare)
    np.bitwise_xor(spare, b, out=spare)
    np.bitwise_and(spare, mask, out=spare)
    np.bitwise_xor(b, spare, out=new_b)
    np.left_shift(spare, shift, out=spare)
    np.bitwise_xor(a, spare, out=new_a)


def gemm_columns(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [R, C] of the gemm layout (qweight or qzeros) to their values, uint8 [R, 8C]."""
    stored = words.contiguous().numpy().view(np.uint32)
    columns = _spread(stored & 0xFFFF)  # the even columns, then the odd ones
    columns |= _spread(stored >> 16) << 8
    return torch.from_numpy(columns.view(np.uint8))


def _spread(words: Any) -> Any:
    """Four nibbles in the low half of each word to the low nibbles of four 16-bit numbers of a 64-bit word."""
    spread = words.astype(np.uint64)
    spread |= spread << 24
    spread |= spread << 12
    spread &= 0x000F000F000F000F
    return spread
