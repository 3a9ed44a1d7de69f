"""What the layouts share: nibbles in words, the padding of the gemv family, and the checks of shapes and dtypes.

A word of any width is read here as its bytes, lowest first (torch runs on little-endian machines only): byte b of a
word holds nibble 2b in its low half and nibble 2b + 1 in its high half. On uint8 a right shift is logical, so the sign
bit of an int32 or int16 word cannot leak into its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import LayoutError
from .base import TensorSpec

if TYPE_CHECKING:
    import torch

PER_WORD = 8  # nibbles of an int32
SYMMETRIC_ZERO = 8


def split(words: torch.Tensor) -> torch.Tensor:
    """Integer words [R, C] to their nibbles, uint8 [R, C * nibbles of a word], lowest nibble first; a new tensor."""
    import torch

    pairs = words.contiguous().view(torch.uint8)
    nibbles = torch.empty(*pairs.shape, 2, dtype=torch.uint8, device=words.device)
    torch.bitwise_and(pairs, 0xF, out=nibbles[..., 0])
    torch.bitwise_right_shift(pairs, 4, out=nibbles[..., 1])
    return nibbles.view(pairs.shape[0], -1)


def join(nibbles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of ``split``: uint8 nibbles [R, C] to words of ``dtype``."""
    pairs = nibbles.contiguous().view(nibbles.shape[0], -1, 2)
    return (pairs[..., 1] << 4).bitwise_or_(pairs[..., 0]).view(dtype)


def zeros_width(in_features: int, group_size: int) -> int:
    """``zw`` of the gemv family: words of zero points in a row; scales are padded to ``8 * zw`` groups.

    The group sizes are those of ``refuses_padded``.
    """
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    words = -(-(in_features // group_size) // PER_WORD)
    return -(-words // multiple) * multiple


def refuses_groups(in_features: int, group_size: int) -> str | None:
    """Why K is not a whole number of groups, or None."""
    if group_size < 1:
        return f"group_size is {group_size}, it has to be at least 1 (-1 is resolved to in_features before)"
    if in_features < 1 or in_features % group_size:
        return f"in_features {in_features} is not a multiple of group_size {group_size}"
    return None


def refuses_multiple(name: str, value: int, multiple: int) -> str | None:
    """Why ``value`` (called ``name``) is not a positive multiple of ``multiple``, or None."""
    if value < 1 or value % multiple:
        return f"{name} {value} is not a multiple of {multiple}"
    return None


def refuses_padded(in_features: int, group_size: int) -> str | None:
    """Why the gemv family cannot hold these groups, or None."""
    if (reason := refuses_groups(in_features, group_size)) is not None:
        return reason
    if group_size not in (32, 64) and group_size < 128:
        return f"group_size {group_size} is not 32, 64 or at least 128 (smaller groups exist only as gemm)"
    return None


def pad_groups(groups: torch.Tensor, padded: int) -> torch.Tensor:
    """[G, N] to a new, contiguous [padded, N], with zeros (positive ones) behind."""
    out = groups.new_zeros(padded, groups.shape[1])
    out[: groups.shape[0]] = groups
    return out


def check_tensors(layout: str, specs: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor]) -> None:
    """LayoutError unless ``tensors`` has every tensor of ``specs`` in its shape and one of its dtypes."""
    for suffix, spec in specs.items():
        if suffix not in tensors:
            raise LayoutError(
                f"layout {layout} needs the tensor {suffix}, got only {', '.join(sorted(tensors)) or 'none'}"
            )
        tensor = tensors[suffix]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != spec.shape or dtype not in spec.dtypes:
            wanted = " or ".join(spec.dtypes)
            raise LayoutError(
                f"layout {layout} wants {suffix} as {wanted} {list(spec.shape)}, got {dtype} {list(tensor.shape)}"
            )


def check_problem(layout: str, reason: str | None) -> None:
    """LayoutError if ``refuses`` gave a reason."""
    if reason is not None:
        raise LayoutError(f"layout {layout} cannot hold this weight: {reason}")
