"""The GEMM kernel for Hopper (sm90), in Gluon: wgmma with the weights as its register operand, activations by TMA.

It computes ``y^T = w^T x^T`` on the bytes of ``awq_fragments``, whose order is that of wgmma's left operand: codes go
from one 16-byte load through a few instructions to the tensor cores. Products are asynchronous: while one chunk of K is
multiplied the next one is unpacked. The scale is applied to the weight, rounded once to the activations' dtype.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.6 has the older name


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
def place_of(tile, m_tiles, n_tiles):
    """Which rows of x and which columns of the weight a tile takes, counted in tiles.

    Tiles that are multiplied at the same time share eight tiles of rows, so that these stay in the L2 however many
    there are.
    """
    group = tile // (8 * n_tiles)
    rows = gl.maximum(gl.minimum(m_tiles - 8 * group, 8), 1)  # past the last tile too
    within = tile % (8 * n_tiles)
    return 8 * group + within % rows, within // rows


@gluon.jit
def share_of(place, shared, blocks):
    """Where a share begins in the blocks of the first ``shared`` tiles, laid end to end."""
    return place * (shared * blocks) // gl.num_programs(0)


@gluon.jit
def my_place():
    """The share of this program: what it may wait for is then done by programs that began before it.

    This takes for granted that programs begin in the order of their numbers, where not all of them fit at once.
    """
    return gl.num_programs(0) - 1 - gl.program_id(0)


@gluon.jit
def turn_of(turn, shared, blocks):
    """Begin and end of a program's turn, in the blocks of all tiles: its share first (turn 0), then whole tiles."""
    begin = (shared + gl.program_id(0) + (turn - 1) * gl.num_programs(0)) * blocks
    end = begin + blocks
    if turn == 0:
        begin = share_of(my_place(), shared, blocks)
        end = share_of(my_place() + 1, shared, blocks)
    return begin, end


@gluon.jit
def following(turn, at, end, shared, blocks):
    """What comes after a piece of a tile that ended before block ``at``: the turn, where it goes on and ends."""
    if at == end:
        turn += 1
        at, end = turn_of(turn, shared, blocks)
    return turn, at, end


@gluon.jit
def fetch(x_desc, xs, full, slot, m_tile, chunk, more, MT: gl.constexpr, W: gl.constexpr):
    """Start the copy of a chunk of x into its slot of the ring, where there is more to copy."""
    hopper.mbarrier.expect(full.index(slot), x_desc.block_type.nbytes, pred=more)
    hopper.tma.async_copy_global_to_shared(
        x_desc, [m_tile * MT, chunk * W], full.index(slot), xs.index(slot), pred=more
    )


@gluon.jit
def piece_of(at, end, blocks, m_tiles, n_tiles, CHUNKS: gl.constexpr):
    """Of the piece of a tile that begins at block ``at``: where it stops, its row tile, its chunks of x."""
    tile = at // blocks
    stop = gl.minimum(end, (tile + 1) * blocks)
    m_tile, _ = place_of(tile, m_tiles, n_tiles)
    return stop, m_tile, (at - tile * blocks) * CHUNKS, (stop - tile * blocks) * CHUNKS


@gluon.jit
def following_chunk(turn, end, stop, m_tile, chunk, last, shared, blocks, m_tiles, n_tiles, CHUNKS: gl.constexpr):
    """The chunk of x after this one: of the same piece of a tile, or the first of the next one."""
    chunk += 1
    if chunk == last:
        turn, at, end = following(turn, stop, end, shared, blocks)
        stop, m_tile, chunk, last = piece_of(at, end, blocks, m_tiles, n_tiles, CHUNKS)
    return turn, end, stop, m_tile, chunk, last


@gluon.jit
def places_in_part(NT: gl.constexpr, MT: gl.constexpr, layout: gl.constexpr):
    """Where the sums of a tile lie in its part: those that a warp has at once, 8 by 8, beside each other."""
    n = gl.arange(0, NT, gl.SliceLayout(1, layout))
    m = gl.arange(0, MT, gl.SliceLayout(0, layout))
    return gl.expand_dims(n // 8 * (8 * MT) + n % 8 * 8, 1) + gl.expand_dims(m // 8 * 64 + m % 8, 0)


@gluon.jit
def give(parts_ptr, counters_ptr, acc, tile, NT: gl.constexpr, MT: gl.constexpr, layout: gl.constexpr):
    """Leave the sums over a piece of K for the program that has the tile's beginning."""
    gl.store(parts_ptr + my_place() * (NT * MT) + places_in_part(NT, MT, layout), acc)
    barrier()  # every thread has stored before one of them says so
    gl.atomic_add(counters_ptr + tile, 1, sem="release")


@gluon.jit
def gather(
    parts_ptr, counters_ptr, acc, tile, shared, blocks, NT: gl.constexpr, MT: gl.constexpr, layout: gl.constexpr
):
    """Add what the others have of this tile, in the order of K, so that two runs agree bit for bit."""
    first = my_place() + 1
    end = first
    while share_of(end, shared, blocks) < (tile + 1) * blocks:
        end += 1
    # Wait until all have given, and leave 0 for the next launch.
    while gl.atomic_cas(counters_ptr + tile, end - first, 0, sem="acquire") != end - first:
        pass
    for place in range(first, end):
        acc += gl.load(parts_ptr + place * (NT * MT) + places_in_part(NT, MT, layout), volatile=True)
    return acc


@gluon.jit
def write(y_desc, ys, acc, m_tile, first, MT: gl.constexpr):
    """Start the copy of a finished tile to y."""
    hopper.tma.store_wait(0)  # of the tile before
    ys.permute((1, 0)).store(acc.to(y_desc.dtype))
    hopper.fence_async_shared()
    hopper.tma.async_copy_shared_to_global(y_desc, [m_tile * MT, first], ys)


@gluon.jit(do_not_specialize=["M", "shared"])
def product(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    parts_ptr,  # [programs, NT, MT] float32; not written unless SHARED
    counters_ptr,  # one for each shared tile, 0 before and after
    x_desc,  # [M, K]
    y_desc,  # [M, N]
    K,
    N,
    M,
    shared,  # tiles whose blocks are shared out evenly among the programs
    GP: gl.constexpr,  # planes in a group: a multiple of 8
    NT: gl.constexpr,
    MT: gl.constexpr,
    P: gl.constexpr,  # planes in a chunk: 2 or 4
    SHARED: gl.constexpr,  # shared > 0
    STAGES: gl.constexpr,  # chunks of x in shared memory
):
    """Tiles of y^T [NT, MT], on as many programs as fit: what does not fill them evenly is cut along K (stream-K)."""
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
    everything = n_tiles * m_tiles * blocks

    xs = gl.allocate_shared_memory(dtype, [STAGES, MT, W], x_desc.layout)
    ys = gl.allocate_shared_memory(dtype, [MT, NT], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], hopper.mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        hopper.mbarrier.init(full.index(i), count=1)
    gdc_wait()
    gdc_launch_dependents()

    turn = gl.num_programs(0) * 0 + (0 if SHARED else 1)  # no constant: it goes on counting in the loop
    at, end = turn_of(turn, shared, blocks)
    p_turn = turn  # what is copied into the ring next, and where
    p_end = end
    p_stop, p_m, p_chunk, p_last = piece_of(at, end, blocks, m_tiles, n_tiles, CHUNKS)
    for slot in gl.static_range(STAGES - 1):
        fetch(x_desc, xs, full, slot, p_m, p_chunk, p_stop <= everything, MT, W)
        p_turn, p_end, p_stop, p_m, p_chunk, p_last = following_chunk(
            p_turn, p_end, p_stop, p_m, p_chunk, p_last, shared, blocks, m_tiles, n_tiles, CHUNKS
        )
    p_slot = STAGES - 1

    slot_at = 0  # slot that is multiplied next
    phase = 0
    # The words, scales and zero points of the first block.
    tile = at // blocks
    m_tile, n_tile = place_of(tile, m_tiles, n_tiles)
    b = at - tile * blocks
    first = n_tile * NT
    n = gl.minimum(first + gl.arange(0, NT, row_layout), N - 1)
    words = load_words(words_ptr, first // 16, b, blocks, column_tiles, NT)
    group = (b * 8) // GP
    scale = gl.load(scales_ptr + group * N + n)
    zero = zeros_of(zeros_ptr, n, group, ZN)
    while at < everything:
        tile = at // blocks
        begin = at - tile * blocks
        stop = gl.minimum(end, (tile + 1) * blocks)
        last = stop - tile * blocks
        next_turn, next_at, next_end = following(turn, stop, end, shared, blocks)
        next_tile = next_at // blocks
        next_begin = next_at - next_tile * blocks
        next_m, next_n_tile = place_of(next_tile, m_tiles, n_tiles)
        more = next_at < everything
        acc = hopper.warpgroup_mma_init(gl.zeros((NT, MT), gl.float32, acc_layout))
        before = gl.zeros((NT, W), dtype, a_layout)
        b = begin
        while b < last:
            # Load the next block's words, of this piece or the next one, ahead of their use.
            ends = b + 1 == last
            next_b = gl.where(ends, next_begin, b + 1)
            next_first = gl.where(ends & more, next_n_tile * NT, first)
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
                hopper.mbarrier.wait(full.index(slot_at), phase)
                acc = hopper.warpgroup_mma(w, xs.index(slot_at).permute((1, 0)), acc, is_async=True)
                # The chunk before is done after this: its slot is free, and so are the registers of its weights.
                acc, before = hopper.warpgroup_mma_wait(1, deps=[acc, before])
                acc = hopper.warpgroup_mma_init(acc)
                before = w
                fetch(x_desc, xs, full, p_slot, p_m, p_chunk, p_stop <= everything, MT, W)
                p_turn, p_end, p_stop, p_m, p_chunk, p_last = following_chunk(
                    p_turn, p_end, p_stop, p_m, p_chunk, p_last, shared, blocks, m_tiles, n_tiles, CHUNKS
                )
                p_slot = gl.where(p_slot + 1 == STAGES, 0, p_slot + 1)
                slot_at += 1
                if slot_at == STAGES:
                    slot_at = 0
                    phase ^= 1
            words = next_words
            scale = next_scale
            zero = next_zero
            b += 1
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        if SHARED:
            if begin > 0:
                give(parts_ptr, counters_ptr, acc, tile, NT, MT, acc_layout)
            else:
                if last < blocks:
                    acc = gather(parts_ptr, counters_ptr, acc, tile, shared, blocks, NT, MT, acc_layout)
                write(y_desc, ys, acc, m_tile, first, MT)
        else:
            write(y_desc, ys, acc, m_tile, first, MT)
        turn = next_turn
        at = next_at
        end = next_end
        m_tile = next_m
        first = next_n_tile * NT
    hopper.tma.store_wait(0)
