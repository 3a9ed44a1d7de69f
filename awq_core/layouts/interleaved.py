"""The bytes that ``gemv_fast`` and ``llm_awq`` share: interleaved int16 words, zero points as ``-(scale * zero)``.

* ``qweight`` int16 [N/4, K]: a row of words holds four output rows, in blocks of 64 words and 64 inputs. Nibble a
  (lowest first) of word ``64j + 16r + t`` (r in 0..3, t in 0..15) of row i is output ``4i + r``,
  input ``64j + 32 * (t // 8) + t % 8 + 8a``
* ``scales`` [8 * zw, N] and the scaled zeros [8 * zw, N]: floating point, padded with zeros behind the K/g groups

``zw`` is ``nibbles.zeros_width``: g cannot be read from the shapes.
K is a multiple of 64 and g, N of 8, and g is 32, 64 or at least 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import Codes, Layout, TensorSpec
from .nibbles import (
    PER_WORD,
    check_problem,
    check_tensors,
    join,
    pad_groups,
    refuses_multiple,
    refuses_padded,
    split,
    zeros_width,
)

if TYPE_CHECKING:
    import torch

ROWS = 4  # output rows in one word
BLOCK = 64  # inputs that are laid out together


def layout(name: str, zeros_name: str, float_dtypes: tuple[str, ...]) -> Layout:
    """The layout whose scaled zeros are stored as ``zeros_name``; scales and zeros have one of ``float_dtypes``."""

    def shapes(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
        padded = PER_WORD * zeros_width(in_features, group_size)
        return {
            "qweight": TensorSpec((out_features // ROWS, in_features), ("int16",)),
            zeros_name: TensorSpec((padded, out_features), float_dtypes),
            "scales": TensorSpec((padded, out_features), float_dtypes),
        }

    def unpack(tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int, group_size: int) -> Codes:
        check_problem(name, refuses(in_features, out_features, group_size))
        check_tensors(name, shapes(in_features, out_features, group_size), tensors)
        groups = in_features // group_size
        scales, scaled_zeros = tensors["scales"][:groups], tensors[zeros_name][:groups]
        return Codes(_deinterleave(tensors["qweight"]), nearest_zeros(scales, scaled_zeros), scales, scaled_zeros)

    def pack(codes: Codes) -> dict[str, torch.Tensor]:
        in_features, out_features = codes.codes.shape
        check_problem(name, refuses(in_features, out_features, codes.group_size))
        padded = PER_WORD * zeros_width(in_features, codes.group_size)
        scaled = codes.scaled_zeros if codes.scaled_zeros is not None else scale_zeros(codes.scales, codes.zeros)
        tensors = {
            "qweight": _interleave(codes.codes),
            zeros_name: pad_groups(scaled, padded),
            "scales": pad_groups(codes.scales, padded),
        }
        check_tensors(name, shapes(in_features, out_features, codes.group_size), tensors)
        return tensors

    out_axis = {"qweight": 0, zeros_name: 1, "scales": 1}
    return Layout(name=name, shapes=shapes, unpack=unpack, pack=pack, out_axis=out_axis, refuses=refuses)


def refuses(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why the problem cannot be held, or None."""
    return (
        refuses_padded(in_features, group_size)
        or refuses_multiple("in_features", in_features, BLOCK)
        or refuses_multiple("out_features", out_features, PER_WORD)
    )


def scale_zeros(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """``-(scale * zero)`` [K/g, N], multiplied in float32 and rounded once to the dtype of ``scales``."""
    import torch

    return scales.to(torch.float32).mul(zeros).neg_().to(scales.dtype)


def nearest_zeros(scales: torch.Tensor, scaled_zeros: torch.Tensor) -> torch.Tensor:
    """The integer zero points nearest to ``-scaled_zeros / scales``, uint8 [K/g, N] in 0 to 15; 0 where the scale is 0.

    A file may hold scaled zeros that are no multiple of the scale (float16 rounding, or another quantizer); these
    integers are then only the nearest ones, and the scaled zeros stay the truth.
    """
    import torch

    quotient = scaled_zeros.to(torch.float32).neg_() if scaled_zeros.dtype != torch.float32 else -scaled_zeros
    quotient.div_(scales.to(torch.float32)).masked_fill_(scales == 0, 0.0)
    return quotient.nan_to_num_(0.0).round_().clamp_(0, 15).to(torch.uint8)


# Input 64j + 32h + 8a + u (h in 0..1, a in 0..3, u in 0..7) of output 4i + r: stored in the order i, j, r, h, u, a.


def _interleave(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [K, N] to words int16 [N/4, K]."""
    import torch

    in_features, out_features = codes.shape
    rows = (
        codes.t().contiguous().view(out_features // ROWS, ROWS, in_features // BLOCK, 2, 4, 4, 2)
    )  # ..., half, a, b, c
    return join(rows.permute(0, 2, 1, 3, 5, 6, 4).reshape(out_features // ROWS, -1), torch.int16)


def _deinterleave(words: torch.Tensor) -> torch.Tensor:
    """Words int16 [N/4, K] to codes uint8 [K, N]."""
    quads, in_features = words.shape
    stored = split(words).view(quads, in_features // BLOCK, ROWS, 2, 8, 4)  # i, j, r, h, u, a
    return stored.permute(0, 2, 1, 3, 5, 4).reshape(quads * ROWS, in_features).t().contiguous()
