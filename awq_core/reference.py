"""The oracle and the last resort: dequantize, then a dense matmul. Any layout, any device, pure torch.

Slow for decoding (it dequantizes the whole weight at each call) and needs room for one dense weight at a time; every
other kernel is checked against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .capability import Capability
from .kernel import ANY_LAYOUT, Backend, Kernel, Weight

if TYPE_CHECKING:
    import torch

DTYPES = frozenset({"float16", "bfloat16", "float32", "float64"})


def dequantize_matmul(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ dequantize(weight)``: x [M, K] to [M, N], the weight rounded once to x's dtype."""
    return x @ weight.dequantize(x.dtype)


REFERENCE = Kernel(
    name="dequantize",
    reads=ANY_LAYOUT,
    capabilities=(Capability(device="*", layouts=frozenset(), dtypes=DTYPES, priority=10),),
    apply=dequantize_matmul,
)

BACKEND = Backend(name="reference", kernels=(REFERENCE,))
