"""The Triton kernels that read ``awq_planes``.

``matmul`` computes the transpose, ``y^T = w^T x^T``: the weight is the left operand of the tensor core, which may stand
in registers, so the codes are never written back to shared memory once they are unpacked.
"""

import triton
import triton.language as tl

# Eight codes of a word as float16: nibbles 0 and 4 by one lop3 as 1024 + q, nibbles 1 and 5 as 64 + q (their bits stand
# four places up in the mantissa), the other four after a shift by 8. 0x6400 is 1024, 0x5400 is 64 in float16.
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
def unpack(words, PTX: tl.constexpr):
    """The eight planes of ``words`` as float16, each with the offset that ``offset`` gives."""
    if PTX:
        planes = tl.inline_asm_elementwise(
            UNPACK, "=h,=h,=h,=h,=h,=h,=h,=h,r", [words], dtype=(tl.float16,) * 8, is_pure=True, pack=1
        )
    else:
        planes = (
            (words & 15).to(tl.float16),
            ((words >> 16) & 15).to(tl.float16),
            ((words >> 4) & 15).to(tl.float16),
            ((words >> 20) & 15).to(tl.float16),
            ((words >> 8) & 15).to(tl.float16),
            ((words >> 24) & 15).to(tl.float16),
            ((words >> 12) & 15).to(tl.float16),
            ((words >> 28) & 15).to(tl.float16),
        )
    return planes


@triton.jit
def offset(J: tl.constexpr, PTX: tl.constexpr):
    """What ``unpack`` has added to the codes of plane J."""
    if not PTX:
        value: tl.constexpr = 0.0
    elif (J // 2) % 2 == 0:
        value: tl.constexpr = 1024.0
    else:
        value: tl.constexpr = 64.0
    return value


@triton.jit
def matmul(
    x_ptr,  # [M, K]
    planes_ptr,  # [ceil(K/128) * 16, N]
    scales_ptr,  # [K/g, N]
    zeros_ptr,  # [K/g, N]
    y_ptr,  # [M, N]
    parts_ptr,  # [SPLIT, M, N] float32
    counters_ptr,  # one for each tile, 0 before and after
    K,
    N,
    M,
    G,  # number of groups
    GP: tl.constexpr,  # planes in a group: g / 16
    MT: tl.constexpr,  # rows of x in a tile
    NT: tl.constexpr,  # columns in a tile
    SPLIT: tl.constexpr,  # parts of K
    STAGES: tl.constexpr,
    SCALE_LATE: tl.constexpr,  # scale the float32 sums of a group, not each weight
    EVEN: tl.constexpr,  # K is a multiple of 128 and N of NT
    PTX: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: Triton's interpreter gets bfloat16 products wrong
):
    """One tile of y^T [NT, MT], or one part of its sum over K; the last part to arrive adds them up in order."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m_tiles = tl.cdiv(M, MT)
    n = (tile // m_tiles) * NT + tl.arange(0, NT)
    m = (tile % m_tiles) * MT + tl.arange(0, MT)
    r = tl.arange(0, 16)
    in_m = (m < M)[None, :]
    in_n = n < N
    blocks = tl.cdiv(K, 128)
    each = tl.cdiv(blocks, SPLIT)
    total = tl.zeros((NT, MT), tl.float32)
    for b in tl.range(part * each, tl.minimum(blocks, (part + 1) * each), num_stages=STAGES):
        at = planes_ptr + (b * 16 + r)[None, :] * N + n[:, None]
        if EVEN:
            words = tl.load(at)
        else:
            words = tl.load(at, in_n[:, None], 0)
        q = unpack(words, PTX)
        x_at = x_ptr + m[None, :] * K + (b * 128 + r)[:, None]
        sums = tl.zeros((NT, MT), tl.float32)
        scale = tl.zeros((NT,), tl.float32)
        zero = tl.zeros((NT,), tl.float16)
        for j in tl.static_range(8):
            if j == 0 or (8 % GP == 0 and j % GP == 0) or (GP % 8 != 0 and 8 % GP != 0):
                group = (b * 8 + j) // GP
                if not EVEN:
                    group = tl.minimum(group, G - 1)
                if SCALE_LATE and j > 0:
                    total += sums * scale[:, None]
                    sums = tl.zeros((NT, MT), tl.float32)
                if EVEN:
                    scale = tl.load(scales_ptr + group * N + n).to(tl.float32)
                    zero = tl.load(zeros_ptr + group * N + n).to(tl.float16)
                else:
                    scale = tl.load(scales_ptr + group * N + n, in_n, 0.0).to(tl.float32)
                    zero = tl.load(zeros_ptr + group * N + n, in_n, 0).to(tl.float16)
            if EVEN:
                x = tl.load(x_at + 16 * j, in_m, 0.0)
            else:
                x = tl.load(x_at + 16 * j, in_m & ((b * 128 + 16 * j + r) < K)[:, None], 0.0)
            w = q[j] - (zero + offset(j, PTX))[:, None]  # exact: integers
            if WIDE:
                x = x.to(tl.float32)
            if SCALE_LATE:
                sums = tl.dot(w.to(x.dtype), x, sums)
            else:
                total = tl.dot((w.to(tl.float32) * scale[:, None]).to(x.dtype), x, total)
        if SCALE_LATE:
            total += sums * scale[:, None]
    inside = in_m & in_n[:, None]
    place = m[None, :] * N + n[:, None]
    if SPLIT == 1:
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), inside)
    else:
        tl.store(parts_ptr + part * M * N + place, total, inside)
        tl.debug_barrier()  # every thread of this program has stored before one of them says so
        if tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((NT, MT), tl.float32)
            for i in range(SPLIT):
                total += tl.load(parts_ptr + i * M * N + place, inside, 0.0, volatile=True)
            tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), inside)
            tl.store(counters_ptr + tile, 0)


@triton.jit
def dequantize(
    planes_ptr, scales_ptr, zeros_ptr, out_ptr, K, N, G, GP: tl.constexpr, NT: tl.constexpr, PTX: tl.constexpr
):
    """One block of 128 rows of the dense weight [K, N], NT columns wide."""
    n = tl.program_id(0) * NT + tl.arange(0, NT)
    b = tl.program_id(1)
    r = tl.arange(0, 16)
    in_n = n < N
    words = tl.load(planes_ptr + (b * 16 + r)[:, None] * N + n[None, :], in_n[None, :], 0)
    q = unpack(words, PTX)
    for j in tl.static_range(8):
        group = tl.minimum((b * 8 + j) // GP, G - 1)
        scale = tl.load(scales_ptr + group * N + n, in_n, 0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group * N + n, in_n, 0).to(tl.float16)
        w = (q[j] - (zero + offset(j, PTX))[None, :]).to(tl.float32) * scale[None, :]
        k = b * 128 + 16 * j + r
        inside = (k < K)[:, None] & in_n[None, :]
        tl.store(out_ptr + k[:, None] * N + n[None, :], w.to(out_ptr.dtype.element_ty), inside)
