"""The Triton kernels of the GEMM backend, on the bytes of ``awq_fragments``."""

import triton
import triton.language as tl

from awq_core.fragments.kernels import accumulate, block_of, last_to_arrive, run, sum_of_parts, unpack


@triton.jit
def matmul(
    x_ptr,  # [M, K]
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,  # [M, N]
    parts_ptr,  # [SPLIT, M, N] float32
    counters_ptr,  # one for each tile, 0 before and after
    K,
    N,
    M,
    G,  # number of groups
    GP: tl.constexpr,  # planes in a group: g / 16
    CH: tl.constexpr,  # planes in a chunk: chunk(g)
    NT: tl.constexpr,  # columns in a tile
    MT: tl.constexpr,  # rows of x in a tile
    SPLIT: tl.constexpr,  # parts of K
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of 128
    FULL: tl.constexpr,  # N is a multiple of NT
    JOIN: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of y^T [NT, MT], or one part of its sum over K; the last part to arrive adds them up in order."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m_tiles = tl.cdiv(M, MT)  # tiles of the same columns follow each other, and find the words in the L2
    first = (tile // m_tiles) * NT
    n = first + tl.arange(0, NT)
    m = (tile % m_tiles) * MT + tl.arange(0, MT)
    total = accumulate(
        x_ptr, words_ptr, scales_ptr, zeros_ptr, first, m, part, K, N, M, G,
        GP, CH, NT, MT, SPLIT, STAGES, EVEN, FULL, JOIN, PTX, WIDE,
    )  # fmt: skip
    inside = (m < M)[None, :] & (n < N)[:, None]
    place = m[None, :] * N + n[:, None]
    if SPLIT == 1:
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), inside)
    else:
        tl.store(parts_ptr + part * M * N + place, total, inside)
        if last_to_arrive(counters_ptr, tile, SPLIT):
            total = sum_of_parts(parts_ptr, place, M * N, inside, NT, MT, SPLIT)
            tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def dequantize(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    K,
    N,
    G,
    GP: tl.constexpr,
    CH: tl.constexpr,
    NT: tl.constexpr,
    PTX: tl.constexpr,
):
    """NT columns by 128 k of the dense weight, transposed: out [N, K]."""
    b = tl.program_id(0)
    first = tl.program_id(1) * NT
    columns = first + tl.arange(0, NT)
    n = tl.minimum(columns, N - 1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    words = block_of(words_ptr, first // 16, b, tl.cdiv(K, 128), tl.cdiv(N, 16), NT, False)
    planes = unpack(words, zeros_ptr, n, b, G, tl.cdiv(N, 8), GP, CH, dtype, NT, PTX)
    k = b * 128 + tl.arange(0, 128)
    codes = run(planes, 0, 8, NT)
    if GP % 8 == 0:
        scale = tl.load(scales_ptr + tl.minimum((b * 8) // GP, G - 1) * N + n)[:, None]
    else:
        group = tl.minimum(k // (16 * GP), G - 1)
        scale = tl.load(scales_ptr + group[None, :] * N + n[:, None])
    w = codes.to(tl.float32) * scale.to(tl.float32)
    tl.store(out_ptr + columns[:, None] * K + k[None, :], w.to(dtype), (columns < N)[:, None] & (k < K)[None, :])
