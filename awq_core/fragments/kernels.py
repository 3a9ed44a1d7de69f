"""Triton functions that read ``awq_fragments`` (described in this package's docstring); kernels are built of them."""

import triton
import triton.language as tl
from triton.language.extra import cuda

# Two words to eight registers, each a pair of neighbouring k of one plane. 0x6400 is 1024 in float16, so that a nibble
# in the lowest bits makes 1024 + q; 0x5400 is 64 and its last four bits lie one nibble up, which makes 64 + q without
# a shift. $10..$17 hold that number plus the zero point for each plane: the difference is exact.
FLOAT16 = tl.constexpr("""
{
.reg .b32 a, b;
shr.u32 a, $8, 8;
shr.u32 b, $9, 8;
lop3.b32 $0, $8, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $8, 0x00f000f0, 0x54005400, 0xea;
lop3.b32 $2, a, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, a, 0x00f000f0, 0x54005400, 0xea;
lop3.b32 $4, $9, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $5, $9, 0x00f000f0, 0x54005400, 0xea;
lop3.b32 $6, b, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $7, b, 0x00f000f0, 0x54005400, 0xea;
sub.f16x2 $0, $0, $10;
sub.f16x2 $1, $1, $11;
sub.f16x2 $2, $2, $12;
sub.f16x2 $3, $3, $13;
sub.f16x2 $4, $4, $14;
sub.f16x2 $5, $5, $15;
sub.f16x2 $6, $6, $16;
sub.f16x2 $7, $7, $17;
}
""")
# The same in bfloat16: 0x4300 is 128, and seven bits of mantissa leave no room for a second nibble. $10..$17 are
# negative and 0x3f80 is 1, since bfloat16 has a fused multiply-add from sm80 on but a subtraction only from sm90 on.
BFLOAT16 = tl.constexpr("""
{
.reg .b32 a, b, c, d, e, f;
shr.u32 a, $8, 4;
shr.u32 b, $8, 8;
shr.u32 c, $8, 12;
shr.u32 d, $9, 4;
shr.u32 e, $9, 8;
shr.u32 f, $9, 12;
lop3.b32 $0, $8, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, a, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $2, b, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $3, c, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $4, $9, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $5, d, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $6, e, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $7, f, 0x000f000f, 0x43004300, 0xea;
mov.b32 a, 0x3f803f80;
fma.rn.bf16x2 $0, $0, a, $10;
fma.rn.bf16x2 $1, $1, a, $11;
fma.rn.bf16x2 $2, $2, a, $12;
fma.rn.bf16x2 $3, $3, a, $13;
fma.rn.bf16x2 $4, $4, a, $14;
fma.rn.bf16x2 $5, $5, a, $15;
fma.rn.bf16x2 $6, $6, a, $16;
fma.rn.bf16x2 $7, $7, a, $17;
}
""")
OUT = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r")


@triton.jit
def shifted_zero(zero, J: tl.constexpr, dtype: tl.constexpr, NT: tl.constexpr):
    """What FLOAT16 or BFLOAT16 takes off plane J: zero [NT] int32 as a float with the plane's own offset."""
    if dtype == tl.bfloat16:
        value = -(zero + 128).to(tl.bfloat16)
    elif J % 2 == 0:
        value = (zero | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        value = (zero | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 960.0
    return tl.broadcast_to(value[:, None], (NT, 16))


@triton.jit
def zero_of(zeros_ptr, n, b, G, ZN, J: tl.constexpr, GP: tl.constexpr):
    """Zero points [NT] int32 of the group in which plane J of block b lies."""
    group = tl.minimum((b * 8 + J) // GP, G - 1)
    return (tl.load(zeros_ptr + group * ZN + n // 8) >> (4 * (n % 8))) & 15


@triton.jit
def scale_of(scales_ptr, n, b, G, N, J: tl.constexpr, GP: tl.constexpr, PTX: tl.constexpr):
    """Scales [NT] of the group in which plane J of block b lies.

    They are loaded two at a time: only loads of four bytes and more are copied asynchronously, ahead of their use.
    """
    group = tl.minimum((b * 8 + J) // GP, G - 1)
    if PTX and scales_ptr.dtype.element_ty.primitive_bitwidth == 16:
        pairs = tl.load(scales_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + (group * N + n) // 2)
        value = (pairs >> (16 * (n % 2))).to(tl.int16).to(scales_ptr.dtype.element_ty, bitcast=True)
    else:
        value = tl.load(scales_ptr + group * N + n)
    return value


@triton.jit
def scales_of(scales_ptr, n, b, G, N, GP: tl.constexpr, CH: tl.constexpr, PTX: tl.constexpr):
    """The scales of the eight planes of block b."""
    s0 = scale_of(scales_ptr, n, b, G, N, 0, GP, PTX)
    s1 = s0 if 1 % CH else scale_of(scales_ptr, n, b, G, N, 1, GP, PTX)
    s2 = s1 if 2 % CH else scale_of(scales_ptr, n, b, G, N, 2, GP, PTX)
    s3 = s2 if 3 % CH else scale_of(scales_ptr, n, b, G, N, 3, GP, PTX)
    s4 = s3 if 4 % CH else scale_of(scales_ptr, n, b, G, N, 4, GP, PTX)
    s5 = s4 if 5 % CH else scale_of(scales_ptr, n, b, G, N, 5, GP, PTX)
    s6 = s5 if 6 % CH else scale_of(scales_ptr, n, b, G, N, 6, GP, PTX)
    s7 = s6 if 7 % CH else scale_of(scales_ptr, n, b, G, N, 7, GP, PTX)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def portable(words, zero, J: tl.constexpr, NT: tl.constexpr):
    """Plane J minus its zero point, [NT, 16] in float16, without PTX."""
    low, high = tl.split(tl.reshape(words, (NT, 8, 2)))
    if J < 4:
        word = low
    else:
        word = high
    even = ((word >> (4 * (J % 4))) & 15) - zero[:, None]
    odd = ((word >> (4 * (J % 4) + 16)) & 15) - zero[:, None]
    return tl.reshape(tl.join(even, odd), (NT, 16)).to(tl.float16)


@triton.jit
def unpack(
    words,
    zeros_ptr,
    n,
    b,
    G,
    ZN,
    GP: tl.constexpr,
    CH: tl.constexpr,
    dtype: tl.constexpr,
    NT: tl.constexpr,
    PTX: tl.constexpr,
):
    """words [NT, 16] to eight planes, each [NT, 16] with its zero point taken off: exact, in ``dtype`` under PTX."""
    z0 = zero_of(zeros_ptr, n, b, G, ZN, 0, GP)
    z1 = z0 if 1 % CH else zero_of(zeros_ptr, n, b, G, ZN, 1, GP)
    z2 = z1 if 2 % CH else zero_of(zeros_ptr, n, b, G, ZN, 2, GP)
    z3 = z2 if 3 % CH else zero_of(zeros_ptr, n, b, G, ZN, 3, GP)
    z4 = z3 if 4 % CH else zero_of(zeros_ptr, n, b, G, ZN, 4, GP)
    z5 = z4 if 5 % CH else zero_of(zeros_ptr, n, b, G, ZN, 5, GP)
    z6 = z5 if 6 % CH else zero_of(zeros_ptr, n, b, G, ZN, 6, GP)
    z7 = z6 if 7 % CH else zero_of(zeros_ptr, n, b, G, ZN, 7, GP)
    if PTX:
        args = [
            words,
            shifted_zero(z0, 0, dtype, NT),
            shifted_zero(z1, 1, dtype, NT),
            shifted_zero(z2, 2, dtype, NT),
            shifted_zero(z3, 3, dtype, NT),
            shifted_zero(z4, 4, dtype, NT),
            shifted_zero(z5, 5, dtype, NT),
            shifted_zero(z6, 6, dtype, NT),
            shifted_zero(z7, 7, dtype, NT),
        ]
        if dtype == tl.bfloat16:
            planes = tl.inline_asm_elementwise(BFLOAT16, OUT, args, dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2)
        else:
            planes = tl.inline_asm_elementwise(FLOAT16, OUT, args, dtype=(tl.float16,) * 8, is_pure=True, pack=2)
    else:
        planes = (
            portable(words, z0, 0, NT),
            portable(words, z1, 1, NT),
            portable(words, z2, 2, NT),
            portable(words, z3, 3, NT),
            portable(words, z4, 4, NT),
            portable(words, z5, 5, NT),
            portable(words, z6, 6, NT),
            portable(words, z7, 7, NT),
        )
    return planes


@triton.jit
def beside(a, b, NT: tl.constexpr, W: tl.constexpr):
    """[NT, W] and [NT, W] to [NT, 2W]: in registers, where the layouts allow it."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (NT, 2 * W))


@triton.jit
def run(planes, J: tl.constexpr, CH: tl.constexpr, NT: tl.constexpr):
    """Planes J to J + CH as one operand [NT, 16 * CH]."""
    if CH == 1:
        value = planes[J]
    elif CH == 2:
        value = beside(planes[J], planes[J + 1], NT, 16)
    elif CH == 4:
        value = beside(beside(planes[J], planes[J + 1], NT, 16), beside(planes[J + 2], planes[J + 3], NT, 16), NT, 32)
    else:
        left = beside(beside(planes[0], planes[1], NT, 16), beside(planes[2], planes[3], NT, 16), NT, 32)
        right = beside(beside(planes[4], planes[5], NT, 16), beside(planes[6], planes[7], NT, 16), NT, 32)
        value = beside(left, right, NT, 64)
    return value


@triton.jit
def columns_of(first, apart, NT: tl.constexpr, PAIR: tl.constexpr):
    """The NT columns of a tile [NT]: from ``first`` on; under PAIR half of them, the others ``apart`` further on."""
    i = tl.arange(0, NT)
    if PAIR:
        n = first + i % (NT // 2) + (i // (NT // 2)) * apart
    else:
        n = first + i
    return n


@triton.jit
def block_of(
    words_ptr, tile, b, blocks, tiles, NT: tl.constexpr, FULL: tl.constexpr, apart=0, PAIR: tl.constexpr = False
):
    """Words [NT, 16] of block b for ``columns_of(16 * tile, apart, NT, PAIR)``; past the last 16 they are repeated."""
    T: tl.constexpr = NT // 16
    e = tl.arange(0, NT * 16)  # c, column tile, lane (g, t), h, p
    column_tile = tile + (e // 128) % T
    if PAIR:
        column_tile = tile + (e // 128) % (T // 2) + ((e // 128) % T // (T // 2)) * (apart // 16)
    if not FULL:
        column_tile = tl.minimum(column_tile, tiles - 1)
    at = column_tile * (blocks * 256) + (e // (128 * T)) * 128 + e % 128
    words = tl.load(words_ptr + at + b * 256)
    words = tl.permute(tl.reshape(words, (2, T, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))  # tile, h, g, c, t, p
    return tl.reshape(words, (NT, 16))


# One thread asks for kilobytes at once: an instruction for each line of 128 bytes holds up the loads that come after.
PREFETCH = tl.constexpr("""
{
.reg .pred asks;
setp.gt.s32 asks, $2, 0;
@asks cp.async.bulk.prefetch.L2.global [$1], $2;
mov.b32 $0, 0;
}
""")


@triton.jit
def fetch_ahead(
    words_ptr, tile, part, K, N, NT: tl.constexpr, SPLIT: tl.constexpr, AHEAD: tl.constexpr, THREADS: tl.constexpr
):
    """Bring the words of the first AHEAD blocks of ``accumulate`` into the L2, from sm90 on; nothing waits for them."""
    blocks = tl.cdiv(K, 128)
    each = tl.cdiv(blocks, SPLIT)
    e = tl.arange(0, THREADS)  # one element a thread: the first NT / 16 ask, each for a column tile
    wanted = tl.minimum(AHEAD, tl.minimum(each, blocks - part * each))
    inside = (e < NT // 16) & (tile + e < tl.cdiv(N, 16))
    size = tl.where(inside, wanted * 1024, 0)
    at = words_ptr + tl.where(inside, ((tile + e) * blocks + part * each) * 256, 0)
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [at.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_inputs():
    """Wait until the kernel before has written its results.

    Under programmatic dependent launch a kernel begins while the one before it still runs. What comes before this call
    must read nothing that the kernel before writes, and write nothing.
    """
    cuda.gdc_wait()


@triton.jit
def let_next_begin():
    """Once every program of this kernel has said so, the next kernel may begin, and wait for this one to end."""
    cuda.gdc_launch_dependents()


@triton.jit
def accumulate(
    x_ptr,  # [M, K]
    words_ptr,
    scales_ptr,
    zeros_ptr,
    first,  # column: a multiple of 16
    m,  # [MT]
    part,  # of K
    K,
    N,
    M,
    G,
    GP: tl.constexpr,  # planes in a group: g / 16
    CH: tl.constexpr,  # planes in a chunk: ``chunk(g)``
    NT: tl.constexpr,
    MT: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of 128
    FULL: tl.constexpr,  # N is a multiple of NT (under PAIR, its half of NT's half)
    JOIN: tl.constexpr,  # whole groups in one product (where its operand order is that of the words: sm90)
    PTX: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: Triton's interpreter gets bfloat16 products wrong
    apart=0,  # a multiple of 16
    PAIR: tl.constexpr = False,
):
    """Part of y^T [NT, MT] in float32: the columns ``columns_of(first, apart)``, rows m, one of SPLIT parts of K.

    The sum over a group is scaled in float32, so that each product is of the exact code and the activation as it is.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    blocks = tl.cdiv(K, 128)
    tiles = tl.cdiv(N, 16)
    each = tl.cdiv(blocks, SPLIT)
    n = columns_of(first, apart, NT, PAIR)
    if not FULL:  # the words and scales past N are those of the last column; their products are not stored
        n = tl.minimum(n, N - 1)
    in_m = (m < M)[None, :]
    W: tl.constexpr = 16 * CH if JOIN else 16
    k = tl.arange(0, W)
    total = tl.zeros((NT, MT), tl.float32)
    for b in tl.range(part * each, tl.minimum(blocks, (part + 1) * each), num_stages=STAGES):
        scales = scales_of(scales_ptr, n, b, G, N, GP, CH, PTX)
        words = block_of(words_ptr, first // 16, b, blocks, tiles, NT, FULL, apart, PAIR)
        planes = unpack(words, zeros_ptr, n, b, G, tl.cdiv(N, 8), GP, CH, dtype, NT, PTX)
        for j in tl.static_range(0, 8, CH):
            sums = tl.zeros((NT, MT), tl.float32)
            for i in tl.static_range(0, 16 * CH, W):
                at = b * 128 + 16 * j + i + k
                x_at = x_ptr + m[None, :] * K + at[:, None]
                if EVEN:
                    x = tl.load(x_at, in_m, 0.0)
                else:
                    x = tl.load(x_at, in_m & (at < K)[:, None], 0.0)
                w = run(planes, j + i // 16, W // 16, NT)
                if WIDE:
                    sums = tl.dot(w.to(tl.float32), x.to(tl.float32), sums)
                else:
                    sums = tl.dot(w.to(dtype), x, sums)
            total += sums * scales[j].to(tl.float32)[:, None]
    return total


@triton.jit
def last_to_arrive(counters_ptr, tile, SPLIT: tl.constexpr):
    """Whether all other parts of this tile have stored their sums; whoever gets True finds them all."""
    tl.debug_barrier()  # every thread of this program has stored before one of them says so
    arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if arrived:
        tl.store(counters_ptr + tile, 0)  # as it was found, for the next launch
    return arrived


@triton.jit
def sum_of_parts(parts_ptr, place, stride, inside, NT: tl.constexpr, MT: tl.constexpr, SPLIT: tl.constexpr):
    """The parts' sums added up in the order of the parts, so that two runs agree bit for bit."""
    total = tl.zeros((NT, MT), tl.float32)
    for i in range(SPLIT):
        total += tl.load(parts_ptr + i * stride + place, inside, 0.0, volatile=True)
    return total
