"""What the processor can do that decides between two ways of the same kernel."""

from __future__ import annotations

import functools

import torch

MULTIPLIES_BFLOAT16 = ("avx512_bf16", "amx_bf16", "avx_ne_convert", "avx10_2")


@functools.cache
def fast_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without them its matmul is far slower than float32's.

    True where PyTorch does not tell.
    """
    tell = getattr(torch.cpu, "get_capabilities", None)  # undocumented; not in every release of PyTorch
    if tell is None:
        return True
    can = tell()
    if can.get("architecture") != "x86_64":
        return True
    return any(can.get(name, False) for name in MULTIPLIES_BFLOAT16)
