"""``unpack_matmul``: many rows of activations on the bytes of ``cpu_int4pack``, through a dense bfloat16 matmul.

PyTorch's int4 kernel takes time in proportion to M; a dense bfloat16 matmul is far faster a row but needs a dense
weight. So a piece of the weight at a time, small enough to stay in the cache, is made dense and multiplied.

The low and the high halves of the bytes are two matrices [K, n/2]; they are kept apart, as a batch of two, because
their product is the smaller thing to put in order. All passes but the first run over long rows.
"""

from __future__ import annotations

import torch
from awq_core.api import Weight

from . import int4pack
from .packing import Section, block_rows, sections
from .scratch import scratch

PIECE = 1 << 20  # weights that are made dense at once: 4 MiB in float32, 2 MiB in bfloat16


def apply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x bfloat16 [M, K] to [M, N]; core adds the bias."""
    block = block_rows()
    if block is None:
        return int4pack.apply(weight, x, bias)
    packed, pairs = weight.tensors["packed"], weight.tensors["scale_and_zero"]
    y = x.new_empty(x.shape[0], packed.shape[0])
    for section in sections(packed.shape[0], block):
        stored = section.bytes_of(packed)
        step = max(1, PIECE // (2 * stored.shape[1] * stored.shape[2]))
        for first in range(0, stored.shape[0], step):
            _piece(section, stored[first : first + step], pairs, first, x, y)
    return y


def _piece(
    section: Section, stored: torch.Tensor, pairs: torch.Tensor, first: int, x: torch.Tensor, y: torch.Tensor
) -> None:
    """Blocks ``first`` and following of a section, bytes [blocks, K, run], into their columns of y."""
    count, in_features, run = stored.shape
    half = count * run
    columns = slice(section.first + 2 * first * run, section.first + 2 * (first * run + half))
    width = 1 if section.tail else run
    dense = _dense_halves(stored, pairs[:, columns].unflatten(1, (-1, 2, width)))
    product = scratch("product", (2, x.shape[0], half), torch.bfloat16)
    torch.bmm(x.expand(2, -1, -1), dense, out=product)
    y[:, columns].unflatten(1, (-1, 2, width)).copy_(product.unflatten(2, (-1, width)).permute(1, 2, 0, 3))


def _dense_halves(stored: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Bytes [blocks, K, run] with their pairs [G, blocks, 2, run, 2] to bfloat16 [2, K, blocks * run]."""
    count, in_features, run = stored.shape
    groups, half = pairs.shape[0], count * run
    bytes_ = stored[0]
    if count > 1:  # concatenating slices is several times as fast as copying the permuted tensor
        bytes_ = torch.cat(stored.unbind(0), 1, out=scratch("bytes", (in_features, half), torch.uint8))
    codes = scratch("codes", (2, in_features, half), torch.uint8)
    torch.bitwise_and(bytes_, 15, out=codes[0])
    torch.bitwise_right_shift(bytes_, 4, out=codes[1])
    scales, zero_terms = scratch("pairs", (2, 2, groups, 1, half), torch.float32)
    ordered = pairs.permute(4, 2, 0, 1, 3)  # [2 of a pair, 2 halves, G, blocks, run]
    scales.view(2, groups, *ordered.shape[3:]).copy_(ordered[0])
    zero_terms.view(2, groups, *ordered.shape[3:]).copy_(ordered[1])
    zero_terms.sub_(scales, alpha=8)
    weight = scratch("weight", (2, groups, in_features // groups, half), torch.float32)
    weight.copy_(codes.view(weight.shape))
    torch.addcmul(zero_terms, weight, scales, out=weight)
    return scratch("dense", (2, in_features, half), torch.bfloat16).copy_(weight.view(2, in_features, half))
