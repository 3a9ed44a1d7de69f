"""The GEMM kernel for Hopper (sm90), in Gluon: wgmma with the weights as its register operand, activations by TMA.

It computes ``y^T = w^T x^T`` on the bytes of ``awq_fragments``, whose order is that of wgmma's left operand: codes go
from one 16-byte load through a few instructions to the tensor cores. Products are asynchronous: while one chunk of K is
multiplied the next one is unpacked. The scale is applied to the weight, rounded once to the activations' dtype.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper


@gluon.constexpr_function
def asm_of(bfloat16, plane, planes):
    """PTX from two words ($n, $n+1) to ``planes`` pairs: (code - zero) * scale; ``$i`` out, then words, zeros, scales.

    The magic numbers are explained in ``awq_core.fragments.kernels``.
    """
    word = f"${planes + plane // 4}"
    zero, scale = planes + 2, 2 * planes + 2
    kind = "bf16x2" if bfloat16 else "f16x2"
    lines = []
    for i in range(planes):
        q = plane % 4 + i
        shift = 4 * q if bfloat16 else 8 * (q // 2)
        source = word
        if shift:
            lines.append(f"shr.u32 t, {word}, {shift};")
            source = "t"
        if bfloat16:
            lines.append(f"lop3.b32 ${i}, {source}, 0x000f000f, 0x43004300, 0xea;")
        elif q % 2 == 0:
            lines.append(f"lop3.b32 ${i}, {source}, 0x000f000f, 0x64006400, 0xea;")
        else:
            lines.append(f"lop3.b32 ${i}, {source}, 0x00f000f0, 0x54005400, 0xea;")
    lines += [f"sub.{kind} ${i}, ${i}, ${zero + i};" for i in range(planes)]
    lines += [f"mul.{kind} ${i}, ${i}, ${scale + i};" for i in range(planes)]
    return "{\n.reg .b32 t;\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def constraints_of(planes):
    """Of that PTX: outputs, two words, and zero points and scales for each plane."""
    return ",".join(["=&r"] * planes + ["r"] * (2 + 2 * planes))


@gluon.constexpr_function
def accumulator(MT, warps):
    """y^T: each warp has 16 columns of the weight for all MT rows of x, four warps share an instruction."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, MT, 16])


@gluon.constexpr_function
def flat(warps):
    """Words as they are loaded: 16 bytes a thread."""
    return gl.BlockedLayout([4], [32], [warps], [0])


@gluon.jit
def load_words(words_ptr, tile, b, blocks, tiles, NT: gl.constexpr):
    """Words [NT * 16] of block b, from column tile ``tile`` on; past the last one it is repeated."""
    T: gl.constexpr = NT // 16
    e = gl.arange(0, NT * 16, flat(gl.num_warps()))  # c, column tile, lane (g, t), h, p
    column_tile = gl.minimum(tile + (e // 128) % T, tiles - 1)
    at = column_tile * (blocks * 256) + (e // (128 * T)) * 128 + e % 128
    return gl.load(words_ptr + at + b * 256)


@gluon.jit
def as_operand(words, NT: gl.constexpr, layout: gl.constexpr):
    """Words [NT * 16] as they lie in the threads that multiply them: [NT, 16]."""
    T: gl.constexpr = NT // 16
    words = gl.permute(gl.reshape(words, (2, T, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))  # tile, h, g, c, t, p
    return gl.convert_layout(gl.reshape(words, (NT, 16)), layout, assert_trivial=True)


@gluon.jit
def zeros_of(zeros_ptr, n, group, ZN):
    """Zero points of the columns n in a group, int32."""
    return (gl.load(zeros_ptr + group * ZN + n // 8) >> (4 * (n % 8))) & 15


@gluon.jit
def shifted_zero(zero, odd: gl.constexpr, dtype: gl.constexpr):
    """The zero point plus what the magic numbers add to the codes of an even or odd plane."""
    if dtype == gl.bfloat16:
        value = (zero + 128).to(gl.bfloat16)
    elif odd:
        value = (zero | 0x6400).to(gl.int16).to(gl.float16, bitcast=True) - 960.0
    else:
        value = (zero | 0x6400).to(gl.int16).to(gl.float16, bitcast=True)
    return value


@gluon.jit
def spread(value, NT: gl.constexpr):
    """One number a column to [NT, 16]."""
    return gl.expand_dims(value, 1).broadcast_to((NT, 16))


@gluon.jit
def beside(a, b, NT: gl.constexpr, W: gl.constexpr):
    """[NT, W] and [NT, W] to [NT, 2W], in registers."""
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), (NT, 2 * W))


@gluon.jit
def unpack(
    words,
    even,
    odd,
    scale,
    J: gl.constexpr,
    P: gl.constexpr,
    dtype: gl.constexpr,
    NT: gl.constexpr,
    layout: gl.constexpr,
):
    """Planes J to J + P of the weight: [NT, 16 P] in ``layout``."""
    e = spread(even, NT)
    o = spread(odd, NT)
    s = spread(scale, NT)
    if P == 2:
        args = [words, e, o, s, s]
    else:
        args = [words, e, o, e, o, s, s, s, s]
    if dtype == gl.bfloat16:
        planes = gl.inline_asm_elementwise(
            asm_of(True, J, P), constraints_of(P), args, dtype=(gl.bfloat16,) * P, is_pure=True, pack=2
        )
    else:
        planes = gl.inline_asm_elementwise(
            asm_of(False, J, P), constraints_of(P), args, dtype=(gl.float16,) * P, is_pure=True, pack=2
        )
    if P == 2:
        value = beside(planes[0], planes[1], NT, 16)
    else:
        value = beside(beside(planes[0], planes[1], NT, 16), beside(planes[2], planes[3], NT, 16), NT, 32)
    return gl.convert_layout(value, layout, assert_trivial=True)


@gluon.jit
def place_of(unit, m_tiles, n_tiles, SPLIT: gl.constexpr):
    """Which rows of x and which columns of the weight a unit multiplies, in tiles.

    Units that run at the same time share eight tiles of rows, so that these stay in the L2 however many there are.
    """
    tile = unit // SPLIT
    group = tile // (8 * n_tiles)
    rows = gl.maximum(gl.minimum(m_tiles - 8 * group, 8), 1)  # past the last unit too
    within = tile % (8 * n_tiles)
    return 8 * group + within % rows, within // rows


@gluon.jit
def first_block(unit, blocks, SPLIT: gl.constexpr):
    """Where the share of K of this unit begins."""
    return (unit % SPLIT) * blocks // SPLIT


@gluon.jit
def end_block(unit, blocks, SPLIT: gl.constexpr):
    """Where it ends."""
    return (unit % SPLIT + 1) * blocks // SPLIT


@gluon.jit
def fetch(x_desc, xs, full, slot, m_tile, chunk, more, MT: gl.constexpr, W: gl.constexpr):
    """Start the copy of a chunk of x into its slot of the ring, where there is more to copy."""
    hopper.mbarrier.expect(full.index(slot), x_desc.block_type.nbytes, pred=more)
    hopper.tma.async_copy_global_to_shared(
        x_desc, [m_tile * MT, chunk * W], full.index(slot), xs.index(slot), pred=more
    )


@gluon.jit
def following_chunk(unit, m_tile, chunk, step, blocks, m_tiles, n_tiles, SPLIT: gl.constexpr, CHUNKS: gl.constexpr):
    """The chunk of x after this one: of the same unit, or the first of the next one."""
    chunk += 1
    if chunk == end_block(unit, blocks, SPLIT) * CHUNKS:
        unit += step
        m_tile, _ = place_of(unit, m_tiles, n_tiles, SPLIT)
        chunk = first_block(unit, blocks, SPLIT) * CHUNKS
    return unit, m_tile, chunk


@gluon.jit(do_not_specialize=["M"])
def product(
    x_desc,  # [M, K]
    y_desc,  # [M, N]
    words_ptr,
    scales_ptr,
    zeros_ptr,
    parts_ptr,  # [SPLIT, M, N] float32, which ``kernels.add_parts`` adds up; not written where SPLIT is 1
    K,
    N,
    M,
    GP: gl.constexpr,  # planes in a group: a multiple of 8
    NT: gl.constexpr,
    MT: gl.constexpr,
    P: gl.constexpr,  # planes in a chunk: 2 or 4
    SPLIT: gl.constexpr,
    STAGES: gl.constexpr,  # chunks of x in shared memory
):
    """Tiles of y^T [NT, MT] (or parts of their sums over K), one after the other, on as many programs as fit."""
    dtype: gl.constexpr = x_desc.dtype
    warps: gl.constexpr = gl.num_warps()
    acc_layout: gl.constexpr = accumulator(MT, warps)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, a_layout)
    W: gl.constexpr = 16 * P
    CHUNKS: gl.constexpr = 8 // P  # in a block of 128 k
    blocks = gl.cdiv(K, 128)
    column_tiles = gl.cdiv(N, 16)
    ZN = gl.cdiv(N, 8)
    m_tiles = gl.cdiv(M, MT)
    n_tiles = gl.cdiv(N, NT)
    units = n_tiles * m_tiles * SPLIT
    step = gl.num_programs(0)

    xs = gl.allocate_shared_memory(dtype, [STAGES, MT, W], x_desc.layout)
    ys = gl.allocate_shared_memory(dtype, [MT, NT], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)

    unit = gl.program_id(0)
    p_unit = unit  # what is copied into the ring next, and where
    m_tile, n_tile = place_of(unit, m_tiles, n_tiles, SPLIT)
    p_m = m_tile
    p_chunk = first_block(p_unit, blocks, SPLIT) * CHUNKS
    for slot in gl.static_range(STAGES - 1):
        fetch(x_desc, xs, full, slot, p_m, p_chunk, p_unit < units, MT, W)
        p_unit, p_m, p_chunk = following_chunk(p_unit, p_m, p_chunk, step, blocks, m_tiles, n_tiles, SPLIT, CHUNKS)
    p_slot = STAGES - 1

    at = 0  # slot that is multiplied next
    phase = 0
    # The words, scales and zero points of the first block.
    b = first_block(unit, blocks, SPLIT)
    first = n_tile * NT
    n = gl.minimum(first + gl.arange(0, NT, row_layout), N - 1)
    words = load_words(words_ptr, first // 16, b, blocks, column_tiles, NT)
    group = (b * 8) // GP
    scale = gl.load(scales_ptr + group * N + n)
    zero = zeros_of(zeros_ptr, n, group, ZN)
    while unit < units:
        end = end_block(unit, blocks, SPLIT)
        b = first_block(unit, blocks, SPLIT)
        acc = hopper.warpgroup_mma_init(gl.zeros((NT, MT), gl.float32, acc_layout))
        before = gl.zeros((NT, W), dtype, a_layout)
        following = unit + step
        more = following < units
        next_m, next_n_tile = place_of(following, m_tiles, n_tiles, SPLIT)
        while b < end:
            # Load the next block's words, of this unit or the next one, ahead of their use.
            last = b + 1 == end
            next_unit = gl.where(last & more, following, unit)
            next_b = gl.where(last, first_block(next_unit, blocks, SPLIT), b + 1)
            next_first = gl.where(last & more, next_n_tile * NT, first)
            next_n = gl.minimum(next_first + gl.arange(0, NT, row_layout), N - 1)
            next_words = load_words(words_ptr, next_first // 16, next_b, blocks, column_tiles, NT)
            next_group = (next_b * 8) // GP
            next_scale = gl.load(scales_ptr + next_group * N + next_n)
            next_zero = zeros_of(zeros_ptr, next_n, next_group, ZN)
            even = shifted_zero(zero, False, dtype)
            odd = shifted_zero(zero, True, dtype)
            s = scale.to(dtype)
            held = as_operand(words, NT, a_layout)
            for i in gl.static_range(CHUNKS):
                w = unpack(held, even, odd, s, i * P, P, dtype, NT, a_layout)
                hopper.mbarrier.wait(full.index(at), phase)
                acc = hopper.warpgroup_mma(w, xs.index(at).permute((1, 0)), acc, is_async=True)
                # The chunk before is done after this: its slot is free, and so are the registers of its weights.
                acc, before = hopper.warpgroup_mma_wait(1, deps=[acc, before])
                acc = hopper.warpgroup_mma_init(acc)
                before = w
                fetch(x_desc, xs, full, p_slot, p_m, p_chunk, p_unit < units, MT, W)
                p_unit, p_m, p_chunk = following_chunk(
                    p_unit, p_m, p_chunk, step, blocks, m_tiles, n_tiles, SPLIT, CHUNKS
                )
                p_slot = gl.where(p_slot + 1 == STAGES, 0, p_slot + 1)
                at += 1
                if at == STAGES:
                    at = 0
                    phase ^= 1
            words = next_words
            scale = next_scale
            zero = next_zero
            b += 1
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        if SPLIT > 1:
            columns = first + gl.arange(0, NT, gl.SliceLayout(1, acc_layout))
            rows = m_tile * MT + gl.arange(0, MT, gl.SliceLayout(0, acc_layout))
            place = gl.expand_dims(rows, 0) * N + gl.expand_dims(columns, 1)
            inside = gl.expand_dims(rows < M, 0) & gl.expand_dims(columns < N, 1)
            gl.store(parts_ptr + (unit % SPLIT).to(gl.int64) * M * N + place, acc, inside)
        else:
            hopper.tma.store_wait(0)  # of the tile before
            ys.permute((1, 0)).store(acc.to(dtype))
            hopper.fence_async_shared()
            hopper.tma.async_copy_shared_to_global(y_desc, [m_tile * MT, first], ys)
        unit = following
        m_tile = next_m
        first = next_n_tile * NT
    hopper.tma.store_wait(0)
