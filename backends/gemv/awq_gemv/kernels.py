"""The Triton kernel for one row of activations, on the bytes of ``awq_planes`` (described in awq_gemm/layout.py).

Each word is unpacked once and multiplied in float32; scale and zero point are applied once a word, to the sum of its
eight products: ``s * (sum(q * x) - z * sum(x))``, the offsets of the unpacking folded in the same way.
"""

import triton
import triton.language as tl

UNPACK = tl.constexpr("""
{
.reg .b32 a, b, c, d, w;
shr.u32 w, $8, 8;
lop3.b32 a, $8, 0x000f000f, 0x64006400, 0xea;
lop3.b32 b, $8, 0x00f000f0, 0x54005400, 0xea;
lop3.b32 c, w, 0x000f000f, 0x64006400, 0xea;
lop3.b32 d, w, 0x00f000f0, 0x54005400, 0xea;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}
""")


@triton.jit
def plane(words, q, J: tl.constexpr, PTX: tl.constexpr):
    """Plane J as float32; under PTX it carries an offset of 1024 or 64."""
    if PTX:
        value = q[J].to(tl.float32)
    else:
        value = ((words >> (4 * (J // 2) + 16 * (J % 2))) & 15).to(tl.float32)
    return value


@triton.jit
def gemv(
    x_ptr,  # [M, K]
    planes_ptr,  # [ceil(K/128) * 16, N]
    scales_ptr,  # [K/g, N]
    zeros_ptr,  # [K/g, N]
    y_ptr,  # [M, N]
    parts_ptr,  # [M, SPLIT, N] float32
    counters_ptr,  # one for each row and tile, 0 before and after
    K,
    N,
    G,  # number of groups
    GP: tl.constexpr,  # planes in a group: g / 16
    NT: tl.constexpr,  # columns in a tile
    BLOCKS: tl.constexpr,  # blocks of 128 k in a step
    SPLIT: tl.constexpr,  # parts of K
    EVEN: tl.constexpr,  # K is a multiple of 128 * BLOCKS and N of NT
    PTX: tl.constexpr,
):
    """NT columns of one row, or one part of their sums over K; the last part to arrive adds them up in order."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.program_id(2)
    n = tile * NT + tl.arange(0, NT)
    in_n = n < N
    t = tl.arange(0, BLOCKS * 16)
    blocks = tl.cdiv(K, 128)
    each = tl.cdiv(blocks, SPLIT * BLOCKS) * BLOCKS
    total = tl.zeros((BLOCKS * 16, NT), tl.float32)
    for first in range(part * each, tl.minimum(blocks, (part + 1) * each), BLOCKS):
        words_at = first * 16 + t
        at = planes_ptr + words_at[:, None] * N + n[None, :]
        if EVEN:
            words = tl.load(at)
        else:
            words = tl.load(at, (words_at < blocks * 16)[:, None] & in_n[None, :], 0)
        if PTX:
            q = tl.inline_asm_elementwise(
                UNPACK, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], dtype=(tl.float16,) * 8, is_pure=True, pack=1
            )
        else:
            q = (words,)
        k = (first + t // 16) * 128 + t % 16
        x_at = x_ptr + row * K + k
        products = tl.zeros((BLOCKS * 16, NT), tl.float32)
        plain = tl.zeros((BLOCKS * 16,), tl.float32)
        shifted = tl.zeros((BLOCKS * 16,), tl.float32)
        for j in tl.static_range(8):
            if EVEN:
                x = tl.load(x_at + 16 * j).to(tl.float32)
            else:
                x = tl.load(x_at + 16 * j, k + 16 * j < K, 0.0).to(tl.float32)
            products += plane(words, q, j, PTX) * x[:, None]
            plain += x
            if PTX:
                shifted += x * (1024.0 if (j // 2) % 2 == 0 else 64.0)
            if j == 7 or (8 % GP == 0 and (j + 1) % GP == 0) or (GP % 8 != 0 and 8 % GP != 0):
                group = ((first + t // 16) * 8 + j) // GP
                if EVEN:
                    scales_at = group[:, None] * N + n[None, :]
                    scale = tl.load(scales_ptr + scales_at).to(tl.float32)
                    zero = tl.load(zeros_ptr + scales_at).to(tl.float32)
                else:
                    scales_at = tl.minimum(group, G - 1)[:, None] * N + n[None, :]
                    scale = tl.load(scales_ptr + scales_at, in_n[None, :], 0.0).to(tl.float32)
                    zero = tl.load(zeros_ptr + scales_at, in_n[None, :], 0).to(tl.float32)
                total += scale * (products - shifted[:, None] - zero * plain[:, None])
                products = tl.zeros((BLOCKS * 16, NT), tl.float32)
                plain = tl.zeros((BLOCKS * 16,), tl.float32)
                shifted = tl.zeros((BLOCKS * 16,), tl.float32)
    sums = tl.sum(total, 0)
    if SPLIT == 1:
        tl.store(y_ptr + row * N + n, sums.to(y_ptr.dtype.element_ty), in_n)
    else:
        tl.store(parts_ptr + (row * SPLIT + part) * N + n, sums, in_n)
        tl.debug_barrier()  # every thread of this program has stored before one of them says so
        counter = counters_ptr + row * tl.num_programs(0) + tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            sums = tl.zeros((NT,), tl.float32)
            for i in range(SPLIT):
                sums += tl.load(parts_ptr + (row * SPLIT + i) * N + n, in_n, 0.0, volatile=True)
            tl.store(y_ptr + row * N + n, sums.to(y_ptr.dtype.element_ty), in_n)
            tl.store(counter, 0)
