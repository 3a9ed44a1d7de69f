"""The kernel on tensor cores: one tile of rows, columns in their order, on GPUs of any vendor."""

import triton
import triton.language as tl

from awq_core.words.kernels import product


@triton.jit(do_not_specialize=["M"])
def tiles(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    W,
    N,
    M,
    GW,
    MT: tl.constexpr,  # rows of x in the tile, at least M
    NT: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    LATE: tl.constexpr,
    UNIFORM: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """NT columns of all rows, or one part of their sums over K; arguments as ``product`` has them."""
    n = tl.program_id(0) * NT + tl.arange(0, NT)
    part = tl.program_id(1)
    m = tl.arange(0, MT)
    product(
        x_ptr, words_ptr, scales_ptr, zeros_ptr, out_ptr, n, m, part, W, N, M, GW,
        MT, NT, R, SPLIT, STAGES, LATE, UNIFORM, EVEN, WIDE,
    )  # fmt: skip
