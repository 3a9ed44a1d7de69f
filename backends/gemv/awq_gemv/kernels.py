"""The Triton kernel for few rows, on the bytes of ``awq_fragments``, and the epilogues that it can end with."""

import triton
import triton.language as tl

from awq_core.fragments.kernels import (
    accumulate,
    columns_of,
    fetch_ahead,
    last_to_arrive,
    let_next_begin,
    sum_of_parts,
    wait_for_inputs,
)


@triton.jit
def few(
    x_ptr,  # [M, K], M at most MT
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,  # [M, N], or [M, N/2] under SILU
    bias_ptr,  # [N]; not read unless BIAS
    other_ptr,  # [M, N]: what ADD adds
    parts_ptr,  # [SPLIT, M, N] float32
    counters_ptr,  # one for each tile, 0 before and after
    K,
    N,
    M,
    G,  # number of groups
    GP: tl.constexpr,  # planes in a group: g / 16
    CH: tl.constexpr,  # planes in a chunk: chunk(g)
    NT: tl.constexpr,  # columns in a tile
    MT: tl.constexpr,
    SPLIT: tl.constexpr,  # parts of K
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,  # y = silu(first half of the columns) * second half
    ADD: tl.constexpr,  # y = x w + other
    EVEN: tl.constexpr,  # K is a multiple of 128
    FULL: tl.constexpr,  # N (under SILU its half) is a multiple of the columns of y that a tile has
    JOIN: tl.constexpr,
    PTX: tl.constexpr,
    WIDE: tl.constexpr,
    THREADS: tl.constexpr,
    AHEAD: tl.constexpr,  # blocks of the weight to fetch before the kernel before has ended; 0: no overlap
):
    """NT columns of y^T for all rows, or one part of their sums; the last part to arrive adds them up in order.

    Epilogues round the product to the activations' dtype first, as separate operations would.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    OUT: tl.constexpr = NT // 2 if SILU else NT  # columns of y in a tile
    tile = tl.program_id(0)
    part = tl.program_id(1)
    first = tile * OUT
    width = N // 2 if SILU else N
    n = columns_of(first, width, NT, SILU)
    m = tl.arange(0, MT)
    if AHEAD:
        fetch_ahead(words_ptr, first // 16, part, K, N, OUT, SPLIT, AHEAD, THREADS)
        if SILU:
            fetch_ahead(words_ptr, (first + width) // 16, part, K, N, OUT, SPLIT, AHEAD, THREADS)
        wait_for_inputs()
    total = accumulate(
        x_ptr, words_ptr, scales_ptr, zeros_ptr, first, m, part, K, N, M, G,
        GP, CH, NT, MT, SPLIT, STAGES, EVEN, FULL, JOIN, PTX, WIDE, width, SILU,
    )  # fmt: skip
    if AHEAD:  # not before, or the next kernel's programs crowd on the multiprocessors where this one's are few
        let_next_begin()
    done = True
    if SPLIT > 1:
        inside = (m < M)[None, :] & (n < N)[:, None]
        if SILU and not FULL:  # columns past the gate's end are those of other tiles
            inside = inside & (first + tl.arange(0, NT) % OUT < width)[:, None]
        place = m[None, :] * N + n[:, None]
        tl.store(parts_ptr + part * M * N + place, total, inside)
        done = last_to_arrive(counters_ptr, tile, SPLIT)
        if done:
            total = sum_of_parts(parts_ptr, place, M * N, inside, NT, MT, SPLIT)
    if done:
        if BIAS:
            bias = tl.load(bias_ptr + n, n < N, 0.0).to(tl.float32)
            total = total.to(dtype).to(tl.float32) + bias[:, None]
        if SILU:
            gate, up = tl.split(tl.permute(tl.reshape(total, (2, OUT, MT)), (1, 2, 0)))
            gate = gate.to(dtype).to(tl.float32)
            gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
            y = gate * up.to(dtype).to(tl.float32)
        else:
            y = total
        out = first + tl.arange(0, OUT)
        inside_y = (m < M)[None, :] & (out < width)[:, None]
        place_y = m[None, :] * width + out[:, None]
        if ADD:
            y = y.to(dtype).to(tl.float32) + tl.load(other_ptr + place_y, inside_y, 0.0).to(tl.float32)
        tl.store(y_ptr + place_y, y.to(dtype), inside_y)
