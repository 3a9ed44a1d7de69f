"""``gemv``: AutoAWQ's GEMV; also what llm-awq wrote from September 2023 to February 2024.

* ``qweight`` int32 [N, K/8]: nibble i (lowest first) of word j is input ``8j + i``
* ``qzeros`` int32 [N, zw]: nibble i of word j is the zero point of group ``8j + i``
* ``scales`` [N, 8 * zw]: float16; newer writers also store bfloat16 or float32

``zw`` is ``nibbles.zeros_width``: the K/g groups are padded with zeros, so g cannot be read from the shapes.
K is a multiple of 8 and g, N of 8, and g is 32, 64 or at least 128.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .base import SCALE_DTYPES, Codes, Layout, TensorSpec
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


def refuses(in_features: int, out_features: int, group_size: int) -> str | None:
    """Why gemv cannot hold the problem, or None."""
    return (
        refuses_padded(in_features, group_size)
        or refuses_multiple("in_features", in_features, PER_WORD)
        or refuses_multiple("out_features", out_features, PER_WORD)
    )


def shapes(in_features: int, out_features: int, group_size: int) -> dict[str, TensorSpec]:
    """The stored tensors of a K x N weight."""
    width = zeros_width(in_features, group_size)
    return {
        "qweight": TensorSpec((out_features, in_features // PER_WORD), ("int32",)),
        "qzeros": TensorSpec((out_features, width), ("int32",)),
        "scales": TensorSpec((out_features, PER_WORD * width), SCALE_DTYPES),
    }


def unpack(tensors: Mapping[str, torch.Tensor], in_features: int, out_features: int, group_size: int) -> Codes:
    """To canonical codes; LayoutError if a tensor is missing or has another shape or dtype."""
    check_problem("gemv", refuses(in_features, out_features, group_size))
    check_tensors("gemv", shapes(in_features, out_features, group_size), tensors)
    groups = in_features // group_size
    return Codes(
        codes=split(tensors["qweight"]).t().contiguous(),
        zeros=split(tensors["qzeros"])[:, :groups].t().contiguous(),
        scales=tensors["scales"][:, :groups].t().contiguous(),
    )


def pack(codes: Codes) -> dict[str, torch.Tensor]:
    """From canonical codes. Of codes with ``scaled_zeros`` the integer ``zeros`` are stored."""
    import torch

    in_features, out_features = codes.codes.shape
    check_problem("gemv", refuses(in_features, out_features, codes.group_size))
    padded = PER_WORD * zeros_width(in_features, codes.group_size)
    tensors = {
        "qweight": join(codes.codes.t().contiguous(), torch.int32),
        "qzeros": join(pad_groups(codes.zeros, padded).t(), torch.int32),
        "scales": pad_groups(codes.scales, padded).t().contiguous(),
    }
    check_tensors("gemv", shapes(in_features, out_features, codes.group_size), tensors)
    return tensors


LAYOUT = Layout(
    name="gemv",
    shapes=shapes,
    unpack=unpack,
    pack=pack,
    out_axis={"qweight": 0, "qzeros": 0, "scales": 0},
    refuses=refuses,
)
