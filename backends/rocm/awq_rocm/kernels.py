"""The kernel on matrix cores for AMD GPUs: tiles of rows and columns, dealt out to the dies.

A word of ``awq_words`` holds eight neighbours along K of one column, which is what a lane of the matrix cores wants of
its operand: CDNA multiplies four or eight of them at a time, RDNA4 eight, RDNA3 two words' worth.
"""

import triton
import triton.language as tl

from awq_core.words.kernels import product


@triton.jit
def on_one_die(program, programs, XCDS: tl.constexpr):
    """Number the programs so that each die gets a run of tiles: those that share words then share its L2."""
    if XCDS > 1:
        die = program % XCDS
        full = programs // XCDS
        more = programs % XCDS  # this many dies get one program more
        program = die * full + tl.minimum(die, more) + program // XCDS
    return program


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
    MT: tl.constexpr,
    NT: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    XCDS: tl.constexpr,  # dies that the programs are dealt out to in turn, each with an L2 of its own
    UNIFORM: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """MT rows of NT columns, or one part of their sums over K; arguments as ``product`` has them."""
    m_tiles = tl.cdiv(M, MT)
    tile = on_one_die(tl.program_id(0), tl.num_programs(0), XCDS)
    n = (tile // m_tiles) * NT + tl.arange(0, NT)
    m = (tile % m_tiles) * MT + tl.arange(0, MT)
    part = tl.program_id(1)
    product(
        x_ptr, words_ptr, scales_ptr, zeros_ptr, out_ptr, n, m, part, W, N, M, GW,
        MT, NT, R, SPLIT, STAGES, True, UNIFORM, EVEN, WIDE,
    )  # fmt: skip
