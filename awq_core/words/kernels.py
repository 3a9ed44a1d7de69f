"""Triton functions that read ``awq_words`` (described in this package's docstring). No line of them is for one vendor,
and Triton's interpreter runs the same lines: the unpacking is masks and bit casts, which compilers turn into lop3 or
and_or. ``rows``, ``combine`` and ``dequantize`` are kernels; those that multiply in tiles are built of ``product``.

A code comes out of ``unpack`` as float16 with 1024 or 64 added; who uses it takes that off along with the zero point.
Programs that share a tile's sum over K each store a part, and ``combine`` adds them in order: no counters, no atomics,
so two runs give the same bits and two streams or graphs may use one weight at a time.
"""

import triton
import triton.language as tl


@triton.jit
def low_half(pairs):
    """The low 16 bits as float16."""
    return pairs.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def unpack(words):
    """The codes of k = 8w .. 8w + 7 as float16, with 1024 added to 0, 1, 4, 5 and 64 to 2, 3, 6, 7.

    0x6400 is 1024 with the mantissa's lowest bit worth 1; 0x5400 is 64, and bit 4 is worth 1.
    """
    shifted = words >> 8
    a = (words & 0x000F000F) | 0x64006400
    b = (words & 0x00F000F0) | 0x54005400
    c = (shifted & 0x000F000F) | 0x64006400
    d = (shifted & 0x00F000F0) | 0x54005400
    return (
        low_half(a),
        low_half(a >> 16),
        low_half(b),
        low_half(b >> 16),
        low_half(c),
        low_half(c >> 16),
        low_half(d),
        low_half(d >> 16),
    )


@triton.jit
def added(I: tl.constexpr):  # noqa: E741
    """What ``unpack`` has added to code I."""
    if (I // 2) % 2 == 0:
        value: tl.constexpr = 1024.0
    else:
        value: tl.constexpr = 64.0
    return value


@triton.jit
def rows(
    x_ptr,  # [M, K]
    words_ptr,  # [K/8, N]
    scales_ptr,  # [K/g, N]
    zeros_ptr,  # [K/g, N] uint8, or scaled in floating point
    out_ptr,  # [SPLIT, M, N]: float32, or y's dtype where SPLIT is 1
    W,  # words of a column: K/8
    N,
    GW,  # words of a group: g/8
    NT: tl.constexpr,  # columns of a program
    R: tl.constexpr,  # words of a column in one step
    SPLIT: tl.constexpr,  # parts of K
    UNIFORM: tl.constexpr,  # a step lies in one group
    EVEN: tl.constexpr,  # W is a multiple of R and N of NT
):
    """NT columns of one row in float32, or one part of their sums over K; scale and zero point once a word."""
    n = tl.program_id(0) * NT + tl.arange(0, NT)
    part = tl.program_id(1)
    row = tl.program_id(2)
    r = tl.arange(0, R)
    in_n = n < N
    steps = tl.cdiv(W, R)
    each = tl.cdiv(steps, SPLIT)
    total = tl.zeros((R, NT), tl.float32)
    for step in range(part * each, tl.minimum(steps, (part + 1) * each)):
        w = step * R + r
        at = words_ptr + w[:, None] * N + n[None, :]
        if EVEN:
            words = tl.load(at)
        else:
            words = tl.load(at, (w < W)[:, None] & in_n[None, :], 0)
        q = unpack(words)
        x_at = x_ptr + row * (W * 8) + w * 8
        products = tl.zeros((R, NT), tl.float32)
        plain = tl.zeros((R,), tl.float32)
        offset = tl.zeros((R,), tl.float32)
        for i in tl.static_range(8):
            if EVEN:
                x = tl.load(x_at + i).to(tl.float32)
            else:
                x = tl.load(x_at + i, w < W, 0.0).to(tl.float32)
            products += q[i].to(tl.float32) * x[:, None]
            plain += x
            offset += x * added(i)
        if UNIFORM:
            groups_at = (step * R // GW) * N + n[None, :]
        else:
            groups_at = (tl.minimum(w, W - 1) // GW)[:, None] * N + n[None, :]
        scale = tl.load(scales_ptr + groups_at, in_n[None, :], 0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + groups_at, in_n[None, :], 0).to(tl.float32)
        products -= offset[:, None]
        if zeros_ptr.dtype.element_ty == tl.uint8:
            total += scale * (products - zero * plain[:, None])
        else:
            total += scale * products + zero * plain[:, None]
    place = (part * tl.num_programs(2) + row) * N + n
    tl.store(out_ptr + place, tl.sum(total, 0).to(out_ptr.dtype.element_ty), in_n)


@triton.jit
def product(
    x_ptr,  # [M, K]
    words_ptr,  # [K/8, N]
    scales_ptr,  # [K/g, N]
    zeros_ptr,  # [K/g, N] uint8, or scaled in floating point
    out_ptr,  # [SPLIT, M, N]: float32, or y's dtype where SPLIT is 1
    n,  # [NT] columns
    m,  # [MT] rows
    part,  # of K
    W,
    N,
    M,
    GW,
    MT: tl.constexpr,
    NT: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    LATE: tl.constexpr,  # scale the float32 sums of a step, where it lies in one group
    UNIFORM: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: Triton's interpreter gets bfloat16 products wrong
):
    """One tile of y^T = w^T x^T on the tensor cores, or one part of its sums over K.

    The unpacked weight is the left operand. Where a step lies in one group (and LATE) its codes less the zero point are
    multiplied as the whole numbers that they are, and the float32 sums are scaled.
    """
    r = tl.arange(0, R)
    k = tl.arange(0, 8 * R)
    in_n = n < N
    steps = tl.cdiv(W, R)
    each = tl.cdiv(steps, SPLIT)
    INTEGERS: tl.constexpr = zeros_ptr.dtype.element_ty == tl.uint8
    total = tl.zeros((NT, MT), tl.float32)
    for step in tl.range(part * each, tl.minimum(steps, (part + 1) * each), num_stages=STAGES):
        w = step * R + r
        at = words_ptr + w[None, :] * N + n[:, None]
        x_at = x_ptr + m[None, :] * (W * 8) + (step * R * 8 + k)[:, None]
        if EVEN:
            words = tl.load(at)
            x = tl.load(x_at, (m < M)[None, :], 0.0)
        else:
            words = tl.load(at, (w < W)[None, :] & in_n[:, None], 0)
            x = tl.load(x_at, (m < M)[None, :] & ((step * R * 8 + k) < W * 8)[:, None], 0.0)
        if UNIFORM:
            groups_at = (step * R // GW) * N + n[:, None]
        else:
            groups_at = (tl.minimum(w, W - 1) // GW)[None, :] * N + n[:, None]
        scale = tl.load(scales_ptr + groups_at, in_n[:, None], 0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + groups_at, in_n[:, None], 0)
        q = unpack(words)
        if INTEGERS:
            low = zero.to(tl.float16) + 1024.0
            high = zero.to(tl.float16) + 64.0
        else:
            low = tl.full((1, 1), 1024.0, tl.float16)
            high = tl.full((1, 1), 64.0, tl.float16)
        even = tl.join(tl.join(q[0] - low, q[4] - low), tl.join(q[2] - high, q[6] - high))  # exact: whole numbers
        odd = tl.join(tl.join(q[1] - low, q[5] - low), tl.join(q[3] - high, q[7] - high))
        codes = tl.join(even, odd)  # [NT, R, 2, 2, 2]: the last three are the bits of k within its word
        if WIDE:
            x = x.to(tl.float32)
        if UNIFORM and INTEGERS and LATE:
            weight = tl.reshape(codes, (NT, 8 * R)).to(x.dtype)
            total += tl.dot(weight, x) * scale
        else:
            scales = tl.reshape(scale, (scale.shape[0], scale.shape[1], 1, 1, 1))
            dense = codes.to(tl.float32) * scales
            if not INTEGERS:
                dense += tl.reshape(zero.to(tl.float32), (zero.shape[0], zero.shape[1], 1, 1, 1))
            total = tl.dot(tl.reshape(dense, (NT, 8 * R)).to(x.dtype), x, total)
    inside = (m < M)[None, :] & in_n[:, None]
    place = (part * M + m)[None, :] * N + n[:, None]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["MN"])
def combine(parts_ptr, y_ptr, MN, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    """y = the sum of the SPLIT parts, in order."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < MN
    total = tl.load(parts_ptr + at, inside, 0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + part * MN + at, inside, 0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def dequantize(words_ptr, scales_ptr, zeros_ptr, out_ptr, W, N, GW, NT: tl.constexpr, R: tl.constexpr):
    """8 * R rows of the dense weight [K, N], NT columns wide."""
    n = tl.program_id(0) * NT + tl.arange(0, NT)
    w = tl.program_id(1) * R + tl.arange(0, R)
    inside = (w < W)[:, None] & (n < N)[None, :]
    q = unpack(tl.load(words_ptr + w[:, None] * N + n[None, :], inside, 0))
    groups_at = (tl.minimum(w, W - 1) // GW)[:, None] * N + n[None, :]
    scale = tl.load(scales_ptr + groups_at, inside, 0.0).to(tl.float32)
    zero = tl.load(zeros_ptr + groups_at, inside, 0)
    place = (w.to(tl.int64) * 8)[:, None] * N + n[None, :]
    for i in tl.static_range(8):
        if zeros_ptr.dtype.element_ty == tl.uint8:
            weight = (q[i] - (zero.to(tl.float16) + added(i))).to(tl.float32) * scale
        else:
            weight = (q[i] - added(i)).to(tl.float32) * scale + zero.to(tl.float32)
        tl.store(out_ptr + place + i * N, weight.to(out_ptr.dtype.element_ty), inside)
