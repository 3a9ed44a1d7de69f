"""The Triton kernels of the decode step beside the linears: norm with residual, attention with rope and cache, choice.

All arithmetic is in float32 between loads and stores; what transformers rounds to the model's dtype on the way (the
residual stream, a normed row before its weight) is rounded here too. Reductions are in a fixed order.
"""

import triton
import triton.language as tl

from awq_core.fragments.kernels import let_next_begin, wait_for_inputs

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rstd(x, SIZE: tl.constexpr, EPS: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, -1) / SIZE + EPS)


@triton.jit
def _weighted(x, w, OFFSET: tl.constexpr, dtype: tl.constexpr):
    """A normed x (float32) times its weight, as float32 that ``dtype`` holds exactly."""
    if OFFSET:
        y = (x * (1.0 + w)).to(dtype).to(tl.float32)
    else:
        y = (x.to(dtype).to(tl.float32) * w).to(dtype).to(tl.float32)
    return y


@triton.jit
def add_norm(
    y_ptr,  # [M, H], what is added to the residual; not read unless ADD
    x_ptr,  # [M, H], the residual, updated in place where ADD
    after_ptr,  # [H], weight of the norm of y before it is added; not read unless AFTER
    w_ptr,  # [H]
    out_ptr,  # [M, H], the normed residual
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    AFTER_EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ADD: tl.constexpr,
    AFTER: tl.constexpr,
    OVERLAP: tl.constexpr,  # begin before the kernel before has ended
):
    """``x += norm(y)`` (or ``y``), ``out = norm(x)``: one program a row."""
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < H
    at = row * H + i
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    w = tl.load(w_ptr + i, inside, 0.0).to(tl.float32)
    if AFTER:
        after = tl.load(after_ptr + i, inside, 0.0).to(tl.float32)
    if OVERLAP:
        let_next_begin()
        wait_for_inputs()
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if ADD:
        y = tl.load(y_ptr + at, inside, 0.0).to(tl.float32)
        if AFTER:
            y = _weighted(y * _rstd(y, H, AFTER_EPS), after, OFFSET, dtype)
        x = (x + y).to(dtype)
        tl.store(x_ptr + at, x, inside)
        x = x.to(tl.float32)
    out = _weighted(x * _rstd(x, H, EPS), w, OFFSET, dtype)
    tl.store(out_ptr + at, out.to(dtype), inside)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == "silu":
        y = x * tl.sigmoid(x)
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def gated(x_ptr, out_ptr, size, BLOCK: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr):
    """out [M, size] = activation(x[:, :size]) * x[:, size:]."""
    if OVERLAP:
        let_next_begin()
        wait_for_inputs()
    row = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * 2 * size + i, inside, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * size + size + i, inside, 0.0).to(tl.float32)
    y = _activated(gate, KIND).to(dtype).to(tl.float32) * up
    tl.store(out_ptr + row * size + i, y.to(dtype), inside)


@triton.jit
def _turned(
    at,  # pointers to the elements of one head or of several, [.., DP]
    other,  # pointers to the elements that they are rotated with
    inside,
    d,
    cos,
    sin,  # with its sign
    w_ptr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    partner,
):
    """Heads [.., D] normed if NORM and rotated, float32 that the dtype of ``at`` holds exactly."""
    dtype: tl.constexpr = at.dtype.element_ty
    x = tl.load(at, inside, 0.0).to(tl.float32)
    p = tl.load(other, inside, 0.0).to(tl.float32)
    if NORM:
        scale = tl.expand_dims(_rstd(x, D, EPS), -1)
        x = _weighted(x * scale, tl.load(w_ptr + d, d < D, 0.0).to(tl.float32), OFFSET, dtype)
        p = _weighted(p * scale, tl.load(w_ptr + partner, d < D, 0.0).to(tl.float32), OFFSET, dtype)
    return (x * cos + p * sin).to(dtype).to(tl.float32)


@triton.jit
def _rope(cos_ptr, sin_ptr, position, d, R: tl.constexpr):
    """For each d: the index that it is rotated with, the cosine, and the sine with its sign; beyond R nothing turns."""
    first = d < R // 2
    turns = d < R
    partner = tl.where(first, d + R // 2, tl.where(turns, d - R // 2, d))
    cos = tl.load(cos_ptr + position * R + d, turns, 1.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * R + d, turns, 0.0).to(tl.float32)
    return partner, cos, tl.where(first, -sin, sin)


@triton.jit
def _block(keys, values, at, end, d, D: tl.constexpr):
    """Keys and values [BLOCK, DP] at these places of the cache; zero past the end."""
    inside = (at < end)[:, None] & (d < D)[None, :]
    k = tl.load(keys + at[:, None] * D + d[None, :], inside, 0.0)
    v = tl.load(values + at[:, None] * D + d[None, :], inside, 0.0)
    return k, v


@triton.jit
def _seen(
    q, k, v, at, end, largest, weight, sums, dtype: tl.constexpr, SCALING: tl.constexpr, SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The running softmax [GP] and its sums [GP, DP] with a block of keys and values more."""
    if WIDE:
        scores = tl.dot(q, tl.trans(k.to(tl.float32)), input_precision="ieee") * SCALING
    else:
        scores = tl.dot(q.to(dtype), tl.trans(k)) * SCALING
    if SOFTCAP > 0:
        scores = SOFTCAP * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / SOFTCAP)) + 1.0))
    scores = tl.where((at < end)[None, :], scores, -float("inf"))
    top = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp2((largest - top) * LOG2E)
    p = tl.exp2((scores - top[:, None]) * LOG2E)
    weight = weight * shrink + tl.sum(p, 1)
    if WIDE:
        sums = sums * shrink[:, None] + tl.dot(p, v.to(tl.float32), input_precision="ieee")
    else:
        sums = sums * shrink[:, None] + tl.dot(p.to(dtype), v)
    return top, weight, sums


@triton.jit
def attend(
    qkv_ptr,  # [B, (HQ + 2 HK) * D]
    cache_ptr,  # [B, 2 HK, S, D], the keys' heads first
    out_ptr,  # [B, HQ * D]
    cos_ptr,  # [S, R]
    sin_ptr,
    q_w_ptr,  # [D], weights of the norms of query and key; not read unless NORM
    k_w_ptr,
    length_ptr,  # [1] tokens that are cached
    pads_ptr,  # [B] tokens at the left that are padding
    parts_ptr,  # [B * HK, SPLITS, G, DP] float32: sums
    tops_ptr,  # [B * HK, 2, G, SPLITS] float32: their largest scores, and their weights
    counters_ptr,  # [B * HK], 0 before and after
    S,
    SCALING: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0: none
    WINDOW: tl.constexpr,  # 0: all
    HK: tl.constexpr,
    G: tl.constexpr,  # query heads of a key head
    GP: tl.constexpr,  # the same as tl.dot wants it
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,  # at most so many shares; a power of 2
    BLOCK: tl.constexpr,  # keys in a step
    OVERLAP: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32 (float32 models, and Triton's interpreter, whose bfloat16 dot is wrong)
):
    """Attention of one token of each sequence: rope, cache write, and softmax over a share of the keys.

    A program takes one key head with its G query heads and one of the shares; shares follow from the length, so that
    all have work whatever the length is. The last share to be done adds them up, in order.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    b = pair // HK
    head = pair % HK
    length = tl.load(length_ptr)
    pads = tl.load(pads_ptr + b)
    first = pads
    if WINDOW > 0:
        first = tl.maximum(first, length + 1 - WINDOW)
    share = tl.cdiv(tl.cdiv(length - first, SPLITS), 16) * 16
    share = tl.maximum(share, 32)
    shares = tl.maximum(tl.cdiv(length - first, share), 1)
    if split >= shares:
        return
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    d = tl.arange(0, DP)
    in_d = d < D
    g = tl.arange(0, GP)
    in_g = (g < G)[:, None] & in_d[None, :]
    partner, cos, sin = _rope(cos_ptr, sin_ptr, length - pads, d, R)
    keys = cache_ptr + (b.to(tl.int64) * 2 * HK + head) * S * D
    values = keys + HK * S.to(tl.int64) * D
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    n = tl.arange(0, BLOCK)
    k, v = _block(keys, values, begin + n, end, d, D)
    if OVERLAP:  # lengths, tables and the cache were written long before
        let_next_begin()
        wait_for_inputs()
    row = qkv_ptr + b.to(tl.int64) * (HK * G + 2 * HK) * D
    q_row = row + (head * G + g)[:, None] * D
    q = _turned(
        q_row + d[None, :],
        q_row + partner[None, :],
        in_g,
        d[None, :],
        cos[None, :],
        sin[None, :],
        q_w_ptr,
        EPS,
        D,
        NORM,
        OFFSET,
        partner[None, :],
    )
    largest = tl.full((GP,), -float("inf"), tl.float32)
    weight = tl.zeros((GP,), tl.float32)
    sums = tl.zeros((GP, DP), tl.float32)
    if end > begin:
        largest, weight, sums = _seen(
            q, k, v, begin + n, end, largest, weight, sums, dtype, SCALING, SOFTCAP, WIDE
        )  # fmt: skip
    for start in range(begin + BLOCK, end, BLOCK):
        k, v = _block(keys, values, start + n, end, d, D)
        largest, weight, sums = _seen(q, k, v, start + n, end, largest, weight, sums, dtype, SCALING, SOFTCAP, WIDE)
    if split == shares - 1:
        # The new token's own key and value, from registers: what this launch writes, no program of it reads.
        k_row = row + (HK * G + head) * D
        k_new = _turned(k_row + d, k_row + partner, in_d, d, cos, sin, k_w_ptr, EPS, D, NORM, OFFSET, partner)
        v_new = tl.load(k_row + HK * D + d, in_d, 0.0)
        tl.store(keys + length * D + d, k_new.to(dtype), in_d)
        tl.store(values + length * D + d, v_new, in_d)
        score = tl.sum(q * k_new[None, :], 1) * SCALING
        if SOFTCAP > 0:
            score = SOFTCAP * (1.0 - 2.0 / (tl.exp2(score * (2.0 * LOG2E / SOFTCAP)) + 1.0))
        top = tl.maximum(largest, score)
        shrink = tl.exp2((largest - top) * LOG2E)
        p = tl.exp2((score - top) * LOG2E)
        weight = weight * shrink + p
        sums = sums * shrink[:, None] + p[:, None] * v_new.to(tl.float32)[None, :]
        largest = top
    out = out_ptr + b.to(tl.int64) * HK * G * D + (head * G + g)[:, None] * D + d[None, :]
    if shares == 1:
        tl.store(out, (sums / weight[:, None]).to(dtype), in_g)
    else:
        part = parts_ptr + ((pair * SPLITS + split) * G + g) * DP
        top_at = tops_ptr + (pair * 2 * G + g) * SPLITS + split
        tl.store(part[:, None] + d[None, :], sums, (g < G)[:, None] & (d >= 0)[None, :])
        tl.store(top_at, largest, g < G)
        tl.store(top_at + G * SPLITS, weight, g < G)
        tl.debug_barrier()  # every thread of this program has stored before one of them says so
        if tl.atomic_add(counters_ptr + pair, 1, sem="acq_rel") == shares - 1:
            # All shares at once, head by head: their loads do not wait for each other.
            i = tl.arange(0, SPLITS)
            for h in tl.static_range(G):
                where = tops_ptr + (pair * 2 * G + h) * SPLITS + i
                tops = tl.load(where, i < shares, -float("inf"), volatile=True)
                weights = tl.load(where + G * SPLITS, i < shares, 0.0, volatile=True)
                each = parts_ptr + ((pair * SPLITS + i) * G + h) * DP
                held = tl.load(
                    each[:, None] + d[None, :], (i < shares)[:, None] & (d >= 0)[None, :], 0.0, volatile=True
                )
                grow = tl.exp2((tops - tl.max(tops, 0)) * LOG2E)
                whole = tl.sum(held * grow[:, None], 0) / tl.sum(weights * grow, 0)
                tl.store(out_ptr + b.to(tl.int64) * HK * G * D + (head * G + h) * D + d, whole.to(dtype), in_d)
            tl.store(counters_ptr + pair, 0)


@triton.jit
def turn_and_keep(
    qkv_ptr,  # [B * T, (HQ + 2 HK) * D]
    q_ptr,  # [B, HQ, T, D]
    cache_ptr,  # [B, 2 HK, S, D]
    cos_ptr,
    sin_ptr,
    q_w_ptr,
    k_w_ptr,
    pads_ptr,  # [B]
    T,
    S,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    EPS: tl.constexpr,
):
    """Prefill: one head of one token. Queries are rotated into ``q``; keys and values go to the cache at 0 to T - 1."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    b = row // T
    t = row % T
    d = tl.arange(0, DP)
    in_d = d < D
    at = qkv_ptr + (row.to(tl.int64) * (HQ + 2 * HK) + head) * D
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    position = tl.maximum(t - tl.load(pads_ptr + b), 0)
    kept = cache_ptr + ((b.to(tl.int64) * 2 * HK + head - HQ) * S + t) * D
    if head < HQ + HK:
        partner, cos, sin = _rope(cos_ptr, sin_ptr, position, d, R)
        if head < HQ:
            x = _turned(at + d, at + partner, in_d, d, cos, sin, q_w_ptr, EPS, D, NORM, OFFSET, partner)
            tl.store(q_ptr + ((b.to(tl.int64) * HQ + head) * T + t) * D + d, x.to(dtype), in_d)
        else:
            x = _turned(at + d, at + partner, in_d, d, cos, sin, k_w_ptr, EPS, D, NORM, OFFSET, partner)
            tl.store(kept + d, x.to(dtype), in_d)
    else:
        tl.store(kept + d, tl.load(at + d, in_d, 0.0), in_d)


@triton.jit
def pick(
    logits_ptr,  # [B, V]
    tokens_ptr,  # [B] int64: the chosen tokens
    ids_ptr,  # [B, S1] int64: all tokens so far; the choice goes to column length + 1
    open_ptr,  # [B] int32: 1 where the sequence is not finished
    left_ptr,  # [1] int32: how many are not
    eos_ptr,  # [E] int64, -1 where there are fewer
    pad_ptr,  # [1] int64
    length_ptr,  # [1] int32: tokens cached, one more after this
    best_ptr,  # [B, BLOCKS] float32
    where_ptr,  # [B, BLOCKS] int32
    counters_ptr,  # [B + 1] int32, 0 before and after
    V,
    S1,
    B,
    BLOCKS: tl.constexpr,
    BLOCKS_P: tl.constexpr,
    SIZE: tl.constexpr,  # logits in a block
    E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The largest logit of each row, the first of equal ones; after the end of a sequence its padding."""
    if OVERLAP:
        let_next_begin()
        wait_for_inputs()
    b = tl.program_id(0)
    block = tl.program_id(1)
    i = block * SIZE + tl.arange(0, SIZE)
    x = tl.load(logits_ptr + b.to(tl.int64) * V + i, i < V, -float("inf")).to(tl.float32)
    best, where = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_ptr + b * BLOCKS + block, best)
    tl.store(where_ptr + b * BLOCKS + block, where + block * SIZE)
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + b, 1, sem="acq_rel") == BLOCKS - 1:
        j = tl.arange(0, BLOCKS_P)
        bests = tl.load(best_ptr + b * BLOCKS + j, j < BLOCKS, -float("inf"), volatile=True)
        _, at = tl.max(bests, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(where_ptr + b * BLOCKS + at, volatile=True).to(tl.int64)
        unfinished = tl.load(open_ptr + b)
        token = tl.where(unfinished != 0, token, tl.load(pad_ptr))
        length = tl.load(length_ptr)
        tl.store(tokens_ptr + b, token)
        tl.store(ids_ptr + b.to(tl.int64) * S1 + length + 1, token)
        ends = tl.load(eos_ptr + tl.arange(0, E))
        ended = (unfinished != 0) & (tl.sum((ends == token).to(tl.int32), 0) > 0)
        if ended:
            tl.store(open_ptr + b, 0)
            tl.atomic_add(left_ptr, -1)
        tl.store(counters_ptr + b, 0)
        if tl.atomic_add(counters_ptr + B, 1, sem="acq_rel") == B - 1:
            tl.store(length_ptr, length + 1)
            tl.store(counters_ptr + B, 0)
