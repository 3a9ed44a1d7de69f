"""Prefill of an unpadded prompt in some ten launches a layer, so that short prompts are not bound by the host."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from .gpu_step import GpuStep, capped, embedded, following, linears
from .launch import add_norm
from .linears import Rows, bound


class Prefill:
    """Over the caches and tables of a ``GpuStep``; attention is PyTorch's."""

    def __init__(self, step: GpuStep) -> None:
        self.step = step
        self.rows = 0
        self.linears: list[tuple[Rows, Rows, Rows, Rows]] = []
        layers = step.decoder.layers
        self.softcaps = any(layer.attention.softcap is not None for layer in layers)
        self.window = min((layer.attention.window or 1 << 62 for layer in layers), default=0)

    def fits(self, length: int) -> bool:
        """Whether prompts of so many tokens can be run here."""
        return not self.softcaps and length <= self.window

    def __call__(self, ids: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor | None:
        """ids [B, T], no padding at the left, an empty cache: to logits [B, V] of the last token; None: not here.

        ``last`` [1] is that token's place, where others follow it only to fill up T (None: T - 1).
        """
        batch, length = ids.shape
        if not self.fits(length):
            return None
        step, decoder = self.step, self.step.decoder
        if self.rows != ids.numel():
            self.rows = ids.numel()
            self.linears = [linears(layer, self.rows) for layer in decoder.layers]
        x = embedded(decoder, ids.reshape(-1))
        h = torch.empty_like(x)
        add_norm(None, x, decoder.layers[0].before_attention, h)
        for layer, attend, (qkv, o, gated_up, down), after in zip(
            decoder.layers, step.attends, self.linears, following(decoder), strict=True
        ):
            a = layer.attention
            q = attend.turn_and_keep(qkv(h), length)
            kept = attend.cache[:, :, :length]
            y = F.scaled_dot_product_attention(
                q,
                kept[:, : a.kv_heads],
                kept[:, a.kv_heads :],
                is_causal=True,
                scale=a.scaling,
                enable_gqa=a.heads != a.kv_heads,
            )
            y = o(y.transpose(1, 2).reshape(self.rows, -1))
            add_norm(y, x, layer.before_mlp, h, layer.after_attention)
            add_norm(down(gated_up(h)), x, after, h, layer.after_mlp)
        rows = h.view(batch, length, -1)
        ends = rows[:, -1].contiguous() if last is None else rows.index_select(1, last).squeeze(1)
        return capped(bound(decoder.head, batch)(ends), decoder.softcap)
