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
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError("the weight holds NaN or inf, which has no code")
    grouped = weight.detach().to(torch.float32).T.reshape(-1, group_size, weight.shape[0])  # [G, g, N]
    if zero_point:
        low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)  # zero must stay representable
        scales = ((high - low) / TOP).clamp(min=SMALLEST_STEP).to(scales_dtype)
        zeros = (-low / scales.float()).round().clamp(0, TOP)
    else:
        scales = (grouped.abs().amax(1) / (TOP // 2)).clamp(min=SMALLEST_STEP).to(scales_dtype)
        zeros = torch.full_like(scales, TOP // 2 + 1, dtype=torch.float32)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"the weight is too large: its scales do not fit {scales_dtype}")
    codes = (grouped / scales.float().unsqueeze(1)).round_().add_(zeros.unsqueeze(1)).clamp_(0, TOP)
    return Codes(codes.to(torch.uint8).reshape(-1, weight.shape[0]), zeros.to(torch.uint8), scales)
