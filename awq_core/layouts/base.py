"""What a checkpoint layout is: where the bytes of one quantized weight lie, and the way to and from the codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SCALE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The shape of a stored tensor and the dtypes (torch's names) that it may have, the usual one first."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Codes:
    """The canonical form of one quantized weight, the same for all layouts.

    ``w[k, n] = (codes[k, n] - zeros[k // g, n]) * scales[k // g, n]``

    * ``codes``: uint8 [K, N], 0 to 15
    * ``zeros``: uint8 [K/g, N], 0 to 15 (all 8 in a symmetric layout)
    * ``scales``: float16, bfloat16 or float32 [K/g, N], as stored
    * ``scaled_zeros``: None, or as stored [K/g, N] where a layout keeps ``-(scale * zero)`` in floating point: then
      ``w = codes * scales + scaled_zeros`` is the truth and ``zeros`` its nearest integer (0 where the scale is 0).
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    scaled_zeros: torch.Tensor | None = None

    @property
    def group_size(self) -> int:
        """g, from the shapes."""
        return int(self.codes.shape[0] // self.scales.shape[0])


def _accepts_all(in_features: int, out_features: int, group_size: int) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Layout:
    """One checkpoint layout. ``group_size`` is always resolved here (a checkpoint's -1 is K).

    * ``shapes(K, N, g)``: the stored tensors by suffix (``qweight``, ``qzeros``, ``scales``, ...), bias left out
    * ``refuses(K, N, g)``: why this layout cannot hold the problem, or None
    * ``unpack(tensors, K, N, g)``: to canonical codes, on the tensors' device
    * ``pack(codes)``: back, bit for bit: ``pack(unpack(t, K, N, g)) == t`` for every valid ``t``
    * ``out_axis``: for each tensor the axis along N, on which q, k and v may be joined
    * ``zero_points``: which values of ``zero_point`` it can store
    """

    name: str
    shapes: Callable[[int, int, int], dict[str, TensorSpec]]
    unpack: Callable[[Mapping[str, torch.Tensor], int, int, int], Codes]
    pack: Callable[[Codes], dict[str, torch.Tensor]]
    out_axis: Mapping[str, int]
    zero_points: frozenset[bool] = frozenset({True})
    refuses: Callable[[int, int, int], str | None] = field(default=_accepts_all)


def dequantize(codes: Codes, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N] in ``dtype``: computed in float32, rounded once."""
    import torch

    groups, out_features = codes.scales.shape
    scales = codes.scales.to(torch.float32).unsqueeze(1)
    weight = codes.codes.view(groups, -1, out_features).to(torch.float32)
    if codes.scaled_zeros is None:
        weight.sub_(codes.zeros.to(torch.float32).unsqueeze(1)).mul_(scales)
    else:
        weight.mul_(scales).add_(codes.scaled_zeros.to(torch.float32).unsqueeze(1))
    return weight.view(-1, out_features).to(dtype)
