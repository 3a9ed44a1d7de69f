"""``gemm``: AutoAWQ's GEMM, the default of the hub; what ``exllama`` and ``ipex`` checkpoints hold too.

* ``qweight`` int32 [K, N/8]: nibble i (lowest first) of word j is column ``8j + [0, 2, 4, 6, 1, 3, 5, 7][i]``,
  so columns 0..7 that hold 0..7 make the word 0x75316420
* ``qzeros`` int32 [K/g, N/8]: the zero points in the same order, as they are (no minus one, unlike GPTQ)
* ``scales`` [K/g, N]: float16; newer writers also store bfloat16 or float32

K is a multiple of g, N of 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import SCALE_DTYPES, Codes, Layout, TensorSpec
from .nibbles import PER_WORD, check_problem, check_tensors, join, refuses_groups, refuses_multiple, split

if TYPE_CHECKING:
    import torch


def refuses(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why gemm cannot hold the problem, or None."""
    return refuses_groups(in_features, group_size) or refuses_multiple("out_features", out_features, PER_WORD)


def shapes(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """The stored tensors of a K x N weight."""
    groups = in_features // group_size
    return {
        "qweight": TensorSpec((in_features, out_features // PER_WORD), ("int32",)),
        "qzeros": TensorSpec((groups, out_features // PER_WORD), ("int32",)),
        "scales": TensorSpec((groups, out_features), SCALE_DTYPES),
    }


def unpack(tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int, group_size: int) -> Codes:
    """To canonical codes; LayoutError if a tensor is missing or has another shape or dtype."""
    check_problem("gemm", refuses(in_features, out_features, group_size))
    check_tensors("gemm", shapes(in_features, out_features, group_size), tensors)
    return Codes(_columns(tensors["qweight"]), _columns(tensors["qzeros"]), tensors["scales"])


def pack(codes: Codes) -> dict[str, torch.Tensor]:
    """From canonical codes. Of codes with ``scaled_zeros`` the integer ``zeros`` are stored."""
    in_features, out_features = codes.codes.shape
    check_problem("gemm", refuses(in_features, out_features, codes.group_size))
    tensors = {"qweight": _words(codes.codes), "qzeros": _words(codes.zeros), "scales": codes.scales.contiguous()}
    check_tensors("gemm", shapes(in_features, out_features, codes.group_size), tensors)
    return tensors


# Nibble i = 4h + j is column 2j + h: the interleave is the transpose of a 2 x 4 block.


def _columns(words: torch.Tensor) -> torch.Tensor:
    """Words [R, N/8] to columns [R, N]."""
    rows = words.shape[0]
    return split(words).view(rows, -1, 2, 4).transpose(2, 3).reshape(rows, -1)


def _words(columns: torch.Tensor) -> torch.Tensor:
    """Columns [R, N] to words [R, N/8]."""
    import torch

    rows = columns.shape[0]
    return join(columns.reshape(rows, -1, 4, 2).transpose(2, 3).reshape(rows, -1), torch.int32)


LAYOUT = Layout(
    name="gemm",
    shapes=shapes,
    unpack=unpack,
    pack=pack,
    out_axis={"qweight": 1, "qzeros": 1, "scales": 1},
    refuses=refuses,
)
