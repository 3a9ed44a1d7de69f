"""The kernel for one row on Hopper (sm90), in Gluon: a stream of weights that begins before the activations are there.

Under programmatic dependent launch the programs of this kernel begin while the kernel before still runs. They ask for
their first words, which nothing before writes, and only then wait for x: the memory is busy from one linear to the
next. A program takes whole tiles of 16 columns, whose words lie one after the other, so no sums cross programs. Its
warps take blocks of 128 k each and multiply them by ``mma`` in eight steps of 16 k; all eight columns of its right
operand are the row of x.

The codes are multiplied as the magic numbers leave them (code + 1024 in float16); what that adds is known from the sum
of x over the block and taken off in float32, together with the zero point: one multiply-add a group instead of one
subtraction a pair of codes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.constexpr_function
def asm_of(bfloat16):
    """PTX of one block: $0-$3 sums; 8 words, 16 pairs of x, zero and scale of two columns, two sums of x.

    The magic numbers are explained in ``awq_core.fragments.kernels``. Even and odd steps have sums of their own, so
    that one product need not wait for the one before.
    """
    kind = "bf16" if bfloat16 else "f16"
    out = [".reg .b32 a<4>, u<4>;", ".reg .f32 d<4>, e<4>, z, s;"]
    for i in range(4):
        out += [f"mov.f32 d{i}, 0f00000000;", f"mov.f32 e{i}, 0f00000000;"]
    for plane in range(8):
        p, nibble = divmod(plane, 4)
        # a0: column g, k of t; a1: column g + 8; a2, a3: the same, k + 8
        words = [f"${4 + p}", f"${4 + 2 + p}", f"${8 + p}", f"${8 + 2 + p}"]
        shift = 4 * nibble if bfloat16 else 8 * (nibble // 2)
        high = not bfloat16 and nibble % 2
        magic = "0x000f000f, 0x43004300" if bfloat16 else "0x00f000f0, 0x54005400" if high else "0x000f000f, 0x64006400"
        for i, word in enumerate(words):
            if shift and not high:
                out.append(f"shr.u32 u{i}, {word}, {shift};")
            out.append(f"lop3.b32 a{i}, {f'u{i}' if shift else word}, {magic}, 0xea;")
        c = "de"[plane % 2]
        sums = ", ".join(f"{c}{i}" for i in range(4))
        x = f"{{${12 + 2 * plane}, ${13 + 2 * plane}}}"
        out.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{sums}}}, {{a0, a1, a2, a3}}, {x}, {{{sums}}};"
        )
    for h in range(2):
        out += [f"mov.b32 z, ${28 + 2 * h};", f"mov.b32 s, ${29 + 2 * h};", "fma.rn.f32 z, z, $33, $32;"]
        for i in (2 * h, 2 * h + 1):
            out += [f"add.f32 d{i}, d{i}, e{i};", f"sub.f32 d{i}, d{i}, z;", f"mul.f32 ${i}, d{i}, s;"]
    return "{\n" + "\n".join(out) + "\n}"


@gluon.constexpr_function
def constraints():
    """Of that PTX: sums, and what it reads."""
    return ",".join(["=&f"] * 4 + ["r"] * 28 + ["f"] * 4)


@gluon.constexpr_function
def flat(each, warps):
    """``each`` neighbours a thread."""
    return gl.BlockedLayout([each], [32], [warps], [0])


@gluon.constexpr_function
def quads(B, warps):
    """[W, B, 128]: four neighbours a thread of each block."""
    return gl.BlockedLayout([1, B, 4], [1, 1, 32], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def apart(B, rest, warps):
    """[W, B, g, t, ...]: B blocks a warp, lanes by column g and pair t, the rest in a thread."""
    ones = [1] * len(rest)
    order = list(range(3 + len(rest), -1, -1))
    return gl.BlockedLayout([1, B, 1, 1, *rest], [1, 1, 8, 4, *ones], [warps, 1, 1, 1, *ones], order)


@gluon.constexpr_function
def plain(rank):
    """Shared memory in row-major order."""
    return gl.SwizzledSharedLayout(1, 1, 1, list(range(rank - 1, -1, -1)))


@gluon.jit
def following(turn, step, STEPS: gl.constexpr):
    """The step after this one: of the same column tile, or the first of the next one."""
    ends = step + 1 == STEPS
    return gl.where(ends, turn + 1, turn), gl.where(ends, 0, step + 1)


@gluon.jit
def tile_of(turn, first, half, SILU: gl.constexpr):
    """The column tile of a turn; under SILU gate and up take turns."""
    tile = first + turn
    if SILU:
        tile = first + turn // 2 + (turn % 2) * half
    return tile


@gluon.jit
def fetch(
    ring, scale_ring, zero_ring, words_ptr, scales_ptr, zeros_ptr, slot, tile, step, more, blocks, N,
    B: gl.constexpr, GP: gl.constexpr,
):  # fmt: skip
    """Start the copy of what a step reads of the weight."""
    W: gl.constexpr = gl.num_warps()
    GB: gl.constexpr = GP // 8  # blocks in a group
    b = step * (W * B)
    left = gl.where(more, blocks - b, 0)
    e = gl.arange(0, W * B * 256, flat(4, W))
    async_copy.async_copy_global_to_shared(ring.index(slot), words_ptr + (tile * blocks + b) * 256 + e, e < left * 256)
    e = gl.arange(0, W * B * 8, flat(1, W))
    pairs = N // 2
    at = tile * 8 + e % 8
    if GB == 1:
        row = b * pairs + e // 8 * pairs
    else:
        row = (b + e // 8) // GB * pairs
    pairs_ptr = scales_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    async_copy.async_copy_global_to_shared(scale_ring.index(slot), pairs_ptr + row + at, (at < pairs) & (e < left * 8))
    e = gl.arange(0, W * B * 2, flat(1, W))
    ZN = N // 8
    at = tile * 2 + e % 2
    if GB == 1:
        row = b * ZN + e // 2 * ZN
    else:
        row = (b + e // 2) // GB * ZN
    async_copy.async_copy_global_to_shared(zero_ring.index(slot), zeros_ptr + row + at, (at < ZN) & (e < left * 2))
    async_copy.commit_group()


@gluon.jit
def row_of(ptr, blocks, B: gl.constexpr, STEPS: gl.constexpr):
    """A row [K] as pairs, a tensor a step; all loads are on their way at once."""
    W: gl.constexpr = gl.num_warps()
    pairs_ptr = ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    e = gl.arange(0, W * B * 64, flat(4, W))
    row = ()
    for s in gl.static_range(STEPS):
        at = s * (W * B * 64) + e
        row = row + (gl.load(pairs_ptr + at, at < blocks * 64, 0),)
    return row


@gluon.jit
def halves_of(pairs, dtype: gl.constexpr):
    """Pairs as two tensors of float32."""
    low = pairs.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return low, high


@gluon.jit
def paired(low, high, dtype: gl.constexpr):
    """Float32 that ``dtype`` holds exactly, as pairs."""
    low = low.to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    high = high.to(dtype).to(gl.int16, bitcast=True).to(gl.int32) << 16
    return low | high


@gluon.jit
def weighted(x, w, OFFSET: gl.constexpr, dtype: gl.constexpr):
    """A normed x times its weight, as float32 that ``dtype`` holds exactly."""
    if OFFSET:
        y = (x * (1.0 + w)).to(dtype).to(gl.float32)
    else:
        y = (x.to(dtype).to(gl.float32) * w).to(dtype).to(gl.float32)
    return y


@gluon.jit
def normed(
    x, y, w, out_ptr, K, blocks, B: gl.constexpr, STEPS: gl.constexpr, PLUS: gl.constexpr, OFFSET: gl.constexpr,
    EPS: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """The RMSNorm of x + y as pairs; the first program writes x + y, which all of them compute."""
    W: gl.constexpr = gl.num_warps()
    e = gl.arange(0, W * B * 64, flat(4, W))
    squares = gl.zeros((W * B * 64,), gl.float32, flat(4, W))
    lows = ()
    highs = ()
    for s in gl.static_range(STEPS):
        low, high = halves_of(x[s], dtype)
        if PLUS:
            more_low, more_high = halves_of(y[s], dtype)
            low = (low + more_low).to(dtype).to(gl.float32)
            high = (high + more_high).to(dtype).to(gl.float32)
            if gl.program_id(0) == 0:
                at = s * (W * B * 64) + e
                pairs_ptr = out_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
                gl.store(pairs_ptr + at, paired(low, high, dtype), at < blocks * 64)
        squares += low * low + high * high
        lows = lows + (low,)
        highs = highs + (high,)
    rstd = gl.rsqrt(gl.sum(squares, 0) / K + EPS)
    row = ()
    for s in gl.static_range(STEPS):
        w_low, w_high = halves_of(w[s], dtype)
        low = weighted(lows[s] * rstd, w_low, OFFSET, dtype)
        high = weighted(highs[s] * rstd, w_high, OFFSET, dtype)
        row = row + (paired(low, high, dtype),)
    return row


@gluon.jit
def keep(row, xs, sums, B: gl.constexpr, STEPS: gl.constexpr, dtype: gl.constexpr):
    """Bring x into shared memory, in the order in which threads read it, and what the magic numbers make of its sums.

    The sums of a block: (code + offset) x adds up to ``sums[0]`` more than it should, and each unit of the zero point
    to ``sums[1]``.
    """
    W: gl.constexpr = gl.num_warps()
    e = gl.arange(0, W * B * 64, flat(4, W))
    for s in gl.static_range(STEPS):
        xs.index(s).permute((0, 1, 2, 4, 3)).store(gl.reshape(row[s], (W, B, 4, 4, 4)))
        low, high = halves_of(row[s], dtype)
        x = low + high
        total = gl.sum(gl.reshape(x, (W * B, 64)), 1)
        if dtype == gl.bfloat16:
            offset = 128.0 * total
        else:  # even and odd planes
            offset = gl.sum(gl.reshape(gl.where(e // 8 % 2 == 0, 1024.0, 64.0) * x, (W * B, 64)), 1)
        sums.index(s).store(gl.join(offset, total))


@gluon.jit
def as_quads(value, B: gl.constexpr):
    """Four a thread of each block."""
    W: gl.constexpr = gl.num_warps()
    return gl.convert_layout(gl.reshape(value, (W, B, 128)), quads(B, W), assert_trivial=True)


@gluon.jit
def pairs_of(xs, step, B: gl.constexpr):
    """The 16 pairs of x that a thread multiplies in a block, four at a time."""
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = apart(B, (4, 4), W)
    x = xs.index(step).permute((0, 1, 3, 2, 4)).load(gl.SliceLayout(2, layout))  # [W, B, t, j, q]
    x = gl.expand_dims(x, 2).broadcast_to((W, B, 8, 4, 4, 4))
    x = gl.permute(gl.reshape(x, (W, B, 32, 2, 2, 4)), (0, 1, 2, 5, 3, 4))
    even, odd = gl.split(x)
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return as_quads(x0, B), as_quads(x1, B), as_quads(x2, B), as_quads(x3, B)


@gluon.jit
def scaling(scale_ring, zero_ring, slot, B: gl.constexpr, scale_type: gl.constexpr):
    """Zero and scale of the two columns of a thread, as bits of float32."""
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = apart(B, (2,), W)  # W, B, g, t, h
    inner: gl.constexpr = gl.SliceLayout(3, layout)
    scales = scale_ring.index(slot)._reinterpret(scale_type, [W, B, 2, 8], plain(4)).permute((0, 1, 3, 2)).load(inner)
    zeros = zero_ring.index(slot).reshape((W, B, 2)).load(gl.SliceLayout(2, inner))
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(3, inner))))
    g = gl.expand_dims(gl.expand_dims(gl.expand_dims(g, 0), 0), 3)
    z = ((gl.expand_dims(zeros, 2) >> (4 * g)) & 15).to(gl.float32).to(gl.int32, bitcast=True)
    s = scales.to(gl.float32).to(gl.int32, bitcast=True)
    z = gl.expand_dims(z, 3).broadcast_to((W, B, 8, 4, 2))
    s = gl.expand_dims(s, 3).broadcast_to((W, B, 8, 4, 2))
    return as_quads(gl.join(z, s), B)


@gluon.jit
def sums_of(sums, step, B: gl.constexpr):
    """The two sums of x over a block, twice."""
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = apart(B, (2, 2), W)  # W, B, g, t, h, which
    inner: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, layout))
    value = sums.index(step).reshape((W, B, 2)).load(gl.SliceLayout(2, inner))
    value = gl.expand_dims(gl.expand_dims(gl.expand_dims(value, 2), 3), 4)
    return as_quads(value.broadcast_to((W, B, 8, 4, 2, 2)), B)


@gluon.jit
def product_of(
    xs, sums, ring, scale_ring, zero_ring, slot, step, B: gl.constexpr, scale_type: gl.constexpr,
    bfloat16: gl.constexpr,
):  # fmt: skip
    """B blocks a warp: [W, 128] scaled sums, four a thread as mma leaves them."""
    W: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, B, 2, 4], [1, 1, 1, 32], [W, 1, 1, 1], [3, 2, 1, 0])
    words = ring.index(slot).reshape((W, B, 2, 128)).load(layout)
    low, high = gl.split(gl.permute(words, (0, 1, 3, 2)))
    x0, x1, x2, x3 = pairs_of(xs, step, B)
    scale = scaling(scale_ring, zero_ring, slot, B, scale_type)
    args = [as_quads(low, B), as_quads(high, B), x0, x1, x2, x3, scale, sums_of(sums, step, B)]
    if bfloat16:
        value = gl.inline_asm_elementwise(asm_of(True), constraints(), args, dtype=gl.float32, is_pure=True, pack=4)
    else:
        value = gl.inline_asm_elementwise(asm_of(False), constraints(), args, dtype=gl.float32, is_pure=True, pack=4)
    return gl.sum(value, 1)


@gluon.jit
def one(
    x_ptr,  # [K], the residual stream under NORM
    plus_ptr,  # [K], what is added to it; not read unless PLUS
    norm_ptr,  # [K], weight of its RMSNorm; not read unless NORM
    stream_ptr,  # [K], the sum; not written unless PLUS
    words_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,  # [N], or [N/2] under SILU
    bias_ptr,  # [N]; not read unless BIAS
    other_ptr,  # [N]: what ADD adds
    K,
    N,
    GP: gl.constexpr,  # planes in a group: a multiple of 8
    B: gl.constexpr,  # blocks that a warp takes in a step
    STEPS: gl.constexpr,  # in K
    D: gl.constexpr,  # steps whose words are on their way or used
    NORM: gl.constexpr,  # multiply norm(x), or norm(x + plus)
    PLUS: gl.constexpr,
    OFFSET: gl.constexpr,  # the norm's factor is 1 + weight, and rounding comes last
    EPS: gl.constexpr,
    BIAS: gl.constexpr,
    SILU: gl.constexpr,  # y = silu(first half of the columns) * second half
    ADD: gl.constexpr,  # y = x w + other
):
    """Columns of y, 16 at a time."""
    W: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    scale_type: gl.constexpr = scales_ptr.dtype.element_ty
    bfloat16: gl.constexpr = dtype == gl.bfloat16
    blocks = gl.cdiv(K, 128)
    width = N // 2 if SILU else N
    half = width // 16
    tiles = gl.cdiv(width, 16)
    first = gl.program_id(0) * tiles // gl.num_programs(0)
    mine = (gl.program_id(0) + 1) * tiles // gl.num_programs(0) - first
    turns = mine * (2 if SILU else 1)
    ring = gl.allocate_shared_memory(gl.int32, [D, W * B * 256], plain(1))
    scale_ring = gl.allocate_shared_memory(gl.int32, [D, W * B * 8], plain(1))
    zero_ring = gl.allocate_shared_memory(gl.int32, [D, W * B * 2], plain(1))
    xs = gl.allocate_shared_memory(gl.int32, [STEPS, W, B, 4, 4, 4], plain(5))
    sums = gl.allocate_shared_memory(gl.float32, [STEPS, W * B, 2], plain(2))
    p_turn = 0  # what is copied into the ring next, and where
    p_step = 0
    for d in gl.static_range(D - 1):
        fetch(
            ring, scale_ring, zero_ring, words_ptr, scales_ptr, zeros_ptr, d, tile_of(p_turn, first, half, SILU),
            p_step, p_turn < turns, blocks, N, B, GP,
        )  # fmt: skip
        p_turn, p_step = following(p_turn, p_step, STEPS)
    p_slot = D - 1
    if NORM:
        norm = row_of(norm_ptr, blocks, B, STEPS)
    gdc_wait()
    if p_turn >= turns:  # the next kernel's words may come once all of these are on their way
        gdc_launch_dependents()
    row = row_of(x_ptr, blocks, B, STEPS)
    if NORM:
        plus = row_of(plus_ptr, blocks, B, STEPS) if PLUS else row
        row = normed(row, plus, norm, stream_ptr, K, blocks, B, STEPS, PLUS, OFFSET, EPS, dtype)
    keep(row, xs, sums, B, STEPS, dtype)
    total = gl.zeros((W, 128), gl.float32, gl.SliceLayout(1, quads(B, W)))
    out: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, 4], [1, 32], [W, 1], [1, 0]))
    held = gl.zeros((128,), gl.float32, out)
    turn = 0
    step = 0
    slot = 0
    while turn < turns:
        tile = tile_of(turn, first, half, SILU)
        async_copy.wait_group(D - 2)
        total += product_of(xs, sums, ring, scale_ring, zero_ring, slot, step, B, scale_type, bfloat16)
        fetch(
            ring, scale_ring, zero_ring, words_ptr, scales_ptr, zeros_ptr, p_slot, tile_of(p_turn, first, half, SILU),
            p_step, p_turn < turns, blocks, N, B, GP,
        )  # fmt: skip
        p_turn, p_step = following(p_turn, p_step, STEPS)
        p_slot = slot
        slot = gl.where(slot + 1 == D, 0, slot + 1)
        if p_turn >= turns:
            gdc_launch_dependents()
        if step == STEPS - 1:
            y = gl.convert_layout(gl.sum(total, 0), out)
            total = gl.zeros((W, 128), gl.float32, gl.SliceLayout(1, quads(B, W)))
            e = gl.arange(0, 128, out)
            n = tile * 16 + e // 16 + e % 4 // 2 * 8
            here = (e % 16 // 4 == 0) & (e % 2 == 0)  # the column of mma that is the row
            if BIAS:
                y = y.to(dtype).to(gl.float32) + gl.load(bias_ptr + n, here & (n < N), 0.0).to(gl.float32)
            if SILU:
                if tile < half:
                    gate = y.to(dtype).to(gl.float32)
                    held = (gate / (1.0 + gl.exp(-gate))).to(dtype).to(gl.float32)
                else:
                    y = held * y.to(dtype).to(gl.float32)
                    gl.store(y_ptr + n - width, y.to(dtype), here & (n - width < width))
            else:
                if ADD:
                    y = y.to(dtype).to(gl.float32) + gl.load(other_ptr + n, here & (n < N), 0.0).to(gl.float32)
                gl.store(y_ptr + n, y.to(dtype), here & (n < N))
        turn, step = following(turn, step, STEPS)
    async_copy.wait_group(0)
