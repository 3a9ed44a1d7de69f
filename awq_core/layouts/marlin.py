"""``marlin``: AutoAWQ's Marlin, symmetric: every zero point is 8 and none is stored.

* ``qweight`` int32 [K/16, 2N]: tiles of 16 x 16, four of them (64 columns) permuted together, see ``_words``
* ``scales`` float16 [K/g, N]: columns permuted in chunks of 64 (of 32 where g is K), see ``_permute_scales``

K is a multiple of 16 and g, N of 64. (The original CUDA kernel wants K % 128, N % 256 and g 128 or K: a kernel's rule.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import LayoutError
from .base import Codes, Layout, TensorSpec
from .nibbles import SYMMETRIC_ZERO, check_problem, check_tensors, join, refuses_groups, refuses_multiple, split

if TYPE_CHECKING:
    import torch

TILE = 16
COLUMNS = 64  # four tiles


def refuses(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why marlin cannot hold the problem, or None."""
    return (
        refuses_groups(in_features, group_size)
        or refuses_multiple("in_features", in_features, TILE)
        or refuses_multiple("out_features", out_features, COLUMNS)
    )


def shapes(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """The stored tensors of a K x N weight."""
    return {
        "qweight": TensorSpec((in_features // TILE, 2 * out_features), ("int32",)),
        "scales": TensorSpec((in_features // group_size, out_features), ("float16",)),
    }


def unpack(tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int, group_size: int) -> Codes:
    """To canonical codes; LayoutError if a tensor is missing or has another shape or dtype."""
    import torch

    check_problem("marlin", refuses(in_features, out_features, group_size))
    check_tensors("marlin", shapes(in_features, out_features, group_size), tensors)
    scales = _restore_scales(tensors["scales"])
    return Codes(_codes(tensors["qweight"]), torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8), scales)


def pack(codes: Codes) -> dict[str, torch.Tensor]:
    """From canonical codes; LayoutError where a group's zero point is not 8 (groups with scale 0 do not count)."""
    in_features, out_features = codes.codes.shape
    check_problem("marlin", refuses(in_features, out_features, codes.group_size))
    asymmetric = int(((codes.zeros != SYMMETRIC_ZERO) & (codes.scales != 0)).sum())
    if asymmetric:
        raise LayoutError(
            f"layout marlin stores symmetric weights only (zero point {SYMMETRIC_ZERO}), but {asymmetric} of "
            f"{codes.zeros.numel()} groups have another zero point: keep the weight as gemm"
        )
    tensors = {"qweight": _words(codes.codes), "scales": _permute_scales(codes.scales)}
    check_tensors("marlin", shapes(in_features, out_features, codes.group_size), tensors)
    return tensors


# A tensor core's lane holds row 8a + 2b + c and column 8d + e of a tile (a, c, d in 0..1, b in 0..3, e in 0..7). Its
# lane number is 4e + b; a word holds (c, d, a) of one of four tiles j side by side, lowest nibble first.


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [K, N] to words int32 [K/16, 2N]."""
    import torch

    rows, columns = codes.shape[0] // TILE, codes.shape[1] // COLUMNS
    tiles = codes.reshape(rows, 2, 4, 2, columns, 4, 2, 8)  # K/16, a, b, c, N/64, j, d, e
    return join(tiles.permute(0, 4, 7, 2, 5, 3, 6, 1).reshape(rows, -1), torch.int32)


def _codes(words: torch.Tensor) -> torch.Tensor:
    """Words int32 [K/16, 2N] to codes uint8 [K, N]."""
    rows, columns = words.shape[0], words.shape[1] // (2 * COLUMNS)
    lanes = split(words).view(rows, columns, 8, 4, 4, 2, 2, 2)  # K/16, N/64, e, b, j, c, d, a
    return lanes.permute(0, 7, 3, 5, 1, 4, 6, 2).reshape(rows * TILE, columns * COLUMNS)


def _permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales [K/g, N] as stored: an 8 x 8 transpose of each 64, or 4 x 4 x 2 to 4 x 4 x 2 of each 32 for one group."""
    groups, out_features = scales.shape
    if groups == 1:
        return scales.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(1, out_features)
    return scales.reshape(groups, -1, 8, 8).transpose(2, 3).reshape(groups, out_features)


# Both are transposes of a square, so each is its own inverse.
_restore_scales = _permute_scales


LAYOUT = Layout(
    name="marlin",
    shapes=shapes,
    unpack=unpack,
    pack=pack,
    out_axis={"qweight": 1, "scales": 1},
    zero_points=frozenset({False}),
    refuses=refuses,
)
