"""Launching the decode step's kernels: grids, block sizes and constants, from tensors and the decoder's description."""

from __future__ import annotations

import os

import torch
import triton

from awq_core.fragments.launch import launch_options, overlaps

from . import kernels
from .model import Attention, Norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROGRAMS = 256  # that splitting the keys of an attention aims at: two for each of an H100's 132 multiprocessors
MOST_SPLITS = 32
ATTEND_BLOCK, ATTEND_WARPS = 64, 4
PICK_BLOCK = 2048
ENDS = 8  # most ids that end a sequence


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def norm_warps(block: int) -> int:
    """Warps for a row of ``block`` elements."""
    return min(16, max(1, block // 512))


def add_norm(
    y: torch.Tensor | None, x: torch.Tensor, norm: Norm, out: torch.Tensor, after: Norm | None = None
) -> torch.Tensor:
    """``x += after(y)`` in place (where y is given), ``out = norm(x)``; all [M, H]."""
    block = power(x.shape[1])
    kernels.add_norm[(x.shape[0],)](
        x if y is None else y,
        x,
        norm.weight if after is None else after.weight,
        norm.weight,
        out,
        H=x.shape[1],
        BLOCK=block,
        EPS=norm.eps,
        AFTER_EPS=norm.eps if after is None else after.eps,
        OFFSET=norm.offset,
        ADD=y is not None,
        AFTER=after is not None,
        OVERLAP=overlaps(x.device),
        num_warps=norm_warps(block),
        **launch_options(x.device),
    )
    return out


def gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """x [M, 2 I] to activation(x[:, :I]) * x[:, I:], [M, I]."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, size)
    kernels.gated[(rows, triton.cdiv(size, 512))](
        x,
        out,
        size,
        BLOCK=512,
        KIND=activation,
        OVERLAP=overlaps(x.device),
        num_warps=4,
        **launch_options(x.device),
    )
    return out


def attention_block(a: Attention) -> int:
    """Keys in a step of the attention, whose first one is loaded into registers ahead."""
    return ATTEND_BLOCK if a.head_dim <= 128 else 32


def splits_for(a: Attention, batch: int, capacity: int) -> int:
    """Into how many shares the keys are split: a power of 2, so that batch, heads and shares fill the device."""
    wanted = power(max(1, PROGRAMS // (batch * a.kv_heads)))
    return max(1, min(wanted, MOST_SPLITS, power(triton.cdiv(capacity, 32))))


class Attend:
    """The attention of one layer over its cache, with the scratch that its shares meet in."""

    def __init__(
        self,
        a: Attention,
        cache: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        length: torch.Tensor,
        pads: torch.Tensor,
        scratch: dict[tuple[int, ...], tuple[torch.Tensor, ...]],
    ) -> None:
        batch, capacity = cache.shape[0], cache.shape[2]
        self.a, self.cache, self.cos, self.sin, self.length, self.pads = a, cache, cos, sin, length, pads
        self.splits = splits_for(a, batch, capacity)
        group = a.heads // a.kv_heads
        shape = (batch * a.kv_heads, self.splits, group, max(16, power(a.head_dim)))
        if shape not in scratch:  # layers follow each other, so they share it
            scratch[shape] = (
                torch.empty(shape, dtype=torch.float32, device=cache.device),
                torch.empty(shape[0], 2, group, self.splits, dtype=torch.float32, device=cache.device),
                torch.zeros(shape[0], dtype=torch.int32, device=cache.device),
            )
        self.parts, self.tops, self.counters = scratch[shape]
        q_norm, k_norm = a.q_norm, a.k_norm
        self.q_weight = cos if q_norm is None else q_norm.weight
        self.k_weight = cos if k_norm is None else k_norm.weight
        self.constants = {
            "SCALING": a.scaling,
            "SOFTCAP": a.softcap or 0.0,
            "WINDOW": a.window or 0,
            "HK": a.kv_heads,
            "G": a.heads // a.kv_heads,
            "GP": max(16, power(a.heads // a.kv_heads)),
            "D": a.head_dim,
            "DP": max(16, power(a.head_dim)),
            "R": cos.shape[1],
            "SPLITS": self.splits,
            "BLOCK": attention_block(a),
            "OVERLAP": overlaps(cache.device),
            "NORM": q_norm is not None,
            "OFFSET": q_norm is not None and q_norm.offset,
            "EPS": 0.0 if q_norm is None else q_norm.eps,
            "WIDE": INTERPRETED or cache.dtype == torch.float32,
        }

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [B, (heads + 2 kv_heads) * D] of the new token to [B, heads * D]."""
        a = self.a
        out = qkv.new_empty(qkv.shape[0], a.heads * a.head_dim)
        kernels.attend[(qkv.shape[0] * a.kv_heads, self.splits)](
            qkv,
            self.cache,
            out,
            self.cos,
            self.sin,
            self.q_weight,
            self.k_weight,
            self.length,
            self.pads,
            self.parts,
            self.tops,
            self.counters,
            self.cache.shape[2],
            **self.constants,
            num_warps=ATTEND_WARPS,
            num_stages=2,
            **launch_options(qkv.device),
        )
        return out

    def turn_and_keep(self, qkv: torch.Tensor, length: int) -> torch.Tensor:
        """Prefill of ``length`` tokens: qkv [B * T, ..] to queries [B, heads, T, D]; the rest goes to the cache."""
        a = self.a
        batch = qkv.shape[0] // length
        q = qkv.new_empty(batch, a.heads, length, a.head_dim)
        names = ("HK", "D", "DP", "R", "NORM", "OFFSET", "EPS")
        kernels.turn_and_keep[(qkv.shape[0], a.heads + 2 * a.kv_heads)](
            qkv,
            q,
            self.cache,
            self.cos,
            self.sin,
            self.q_weight,
            self.k_weight,
            self.pads,
            length,
            self.cache.shape[2],
            HQ=a.heads,
            **{name: self.constants[name] for name in names},
            num_warps=1,
        )
        return q


class Pick:
    """Greedy choice on the device: the next token of each row, the ids so far, and which rows are finished."""

    def __init__(self, batch: int, capacity: int, length: torch.Tensor) -> None:
        device = length.device
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self.ids = torch.zeros(batch, capacity + 1, dtype=torch.long, device=device)
        self.open = torch.ones(batch, dtype=torch.int32, device=device)
        self.left = torch.ones(1, dtype=torch.int32, device=device)
        self.ends = torch.full((ENDS,), -1, dtype=torch.long, device=device)
        self.pad = torch.zeros(1, dtype=torch.long, device=device)
        self.counters = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        self.length = length
        self.best: torch.Tensor | None = None
        self.where: torch.Tensor | None = None

    def start(self, tokens: torch.Tensor, unfinished: torch.Tensor, ends: torch.Tensor | None, pad: int) -> None:
        """``tokens`` [B] come next; ``ends`` [E], E <= ENDS, end a sequence (None: nothing does)."""
        self.tokens.copy_(tokens)
        self.open.copy_(unfinished)
        self.left.copy_(unfinished.sum())
        self.ends.fill_(-1)
        if ends is not None:
            self.ends[: ends.numel()] = ends
        self.pad.fill_(pad)

    def __call__(self, logits: torch.Tensor) -> None:
        """Take the largest of logits [B, V]; ``length`` advances."""
        batch, size = logits.shape
        blocks = triton.cdiv(size, PICK_BLOCK)
        if self.best is None or self.where is None:
            self.best = torch.empty(batch, blocks, dtype=torch.float32, device=logits.device)
            self.where = torch.empty(batch, blocks, dtype=torch.int32, device=logits.device)
        kernels.pick[(batch, blocks)](
            logits,
            self.tokens,
            self.ids,
            self.open,
            self.left,
            self.ends,
            self.pad,
            self.length,
            self.best,
            self.where,
            self.counters,
            size,
            self.ids.shape[1],
            batch,
            BLOCKS=blocks,
            BLOCKS_P=power(blocks),
            SIZE=PICK_BLOCK,
            E=ENDS,
            OVERLAP=overlaps(logits.device),
            num_warps=8,
            **launch_options(logits.device),
        )
