"""Round to nearest: the codes of a weight without any calibration, by AutoAWQ's grid (integer zero points)."""

from __future__ import annotations

import torch

from ..errors import CheckpointError
from ..layouts import Codes

TOP = 15  # the largest 4-bit code
SMALLEST_STEP = 1e-5  # of a group that is constant; AutoAWQ's figure


def quantize_weight(
    weight: torch.Tensor, group_size: int, zero_point: bool = True, scales_dtype: torch.dtype = torch.float16
) -> Codes:
    """Quantize a dense weight [N, K] (as nn.Linear holds it) to 4 bits in groups of ``group_size`` along K.

    With ``zero_point`` the grid spans each group's own range; without, it is symmetric about 0 with codes offset by 8.
    Codes are rounded with the scale as it is stored, so that rounding the scale costs nothing twice.

    Raises:
        CheckpointError: the weight has NaN or inf, or scales that ``scales_dtype`` cannot hold.
    """
    # Along rows of K the groups are contiguous; only the codes, a byte each, are transposed at the end.
    rows = weight.shape[0]
    grouped = weight.detach().to(torch.float32, copy=True).reshape(rows, -1, group_size)  # [N, G, g]
    low, high = torch.aminmax(grouped, dim=2)
    if not bool(torch.isfinite(high - low).all()):  # NaN and inf of any element come through
        _check_finite(weight)
    if zero_point:
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero must stay representable
        scales = ((high - low) / TOP).clamp(min=SMALLEST_STEP).to(scales_dtype)
        zeros = (-low / scales.float()).round().clamp(0, TOP)
    else:
        scales = (torch.maximum(-low, high) / (TOP // 2)).clamp(min=SMALLEST_STEP).to(scales_dtype)
        zeros = torch.full_like(scales, TOP // 2 + 1, dtype=torch.float32)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"the weight is too large: its scales do not fit {scales_dtype}")
    codes = grouped.div_(scales.float().unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, TOP)
    return Codes(
        codes.to(torch.uint8).reshape(rows, -1).T.contiguous(),
        zeros.to(torch.uint8).T.contiguous(),
        scales.T.contiguous(),
    )


def _check_finite(weight: torch.Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError("the weight holds NaN or inf, which has no code")
