"""The decode step in plain torch: one token of each sequence through the whole decoder, on any device.

It computes what transformers' modules compute, in fewer operations: on a CPU a small operation costs a microsecond or
two whatever its size, and a decoder of 30 layers has hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from .head import head_op
from .linears import bound, joined
from .model import Attention, Decoder, Layer, Norm
from .storage import Storage, outside_inference_mode, rope_tables

Op = Callable[[torch.Tensor], torch.Tensor]
FLASH_LIMIT = 1024  # keys above which two matmuls beat PyTorch's CPU attention, which gives each head to one thread


class TorchStep:
    """``step(tokens [B], length, pads)`` writes keys and values at ``length`` and gives the logits [B, V]."""

    def __init__(self, decoder: Decoder, storage: Storage) -> None:
        self.batch = batch = storage.batch
        self.cached = storage.dtype
        self.embedding, self.scale = decoder.embedding, decoder.embedding_scale
        self.tables = {kind: _Rope(cos, sin) for kind, (cos, sin) in rope_tables(decoder, storage.capacity).items()}
        self.layers = [
            _LayerStep(layer, self.tables[layer.attention.rope], storage.layers[i], batch)
            for i, layer in enumerate(decoder.layers)
        ]
        self.norm = norm_op(decoder.norm, batch)
        self.head, self.softcap = head_op(decoder.head, batch, decoder.int8_head), decoder.softcap

    def __call__(self, tokens: torch.Tensor, length: int, pads: torch.Tensor | None) -> torch.Tensor:
        """``length`` tokens are cached; ``pads`` [B] is how many of them are padding at the left (None: none)."""
        x = F.embedding(tokens, self.embedding)
        if self.scale is not None:
            x = x * self.scale
        mask = None if pads is None else padding_mask(pads, length + 1, self.cached)
        for table in self.tables.values():
            table.at(length, pads)
        for layer in self.layers:
            x = layer(x, length, mask)
        logits = self.head(self.norm(x))
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class _Rope:
    """Cosines and sines for ``x.mul_(cos).addcmul_(x.flip(halves), sin)``: [.., 2, R/2], the signs in the sines."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        half = cos.shape[-1] // 2
        with outside_inference_mode():
            self.all_cos = cos.view(-1, 2, half)
            self.all_sin = torch.stack((-sin[:, :half], sin[:, half:]), dim=1)
        self.size = cos.shape[-1]
        self.cos, self.sin = self.all_cos, self.all_sin

    def at(self, length: int, pads: torch.Tensor | None) -> None:
        """Take the position of the next token of each sequence."""
        if pads is None:
            self.cos, self.sin = self.all_cos[length], self.all_sin[length]
        else:
            positions = length - pads
            self.cos, self.sin = self.all_cos[positions].unsqueeze(1), self.all_sin[positions].unsqueeze(1)

    def turn(self, heads: torch.Tensor) -> None:
        """Rotate [B, H, D] in place."""
        part = heads if heads.shape[-1] == self.size else heads[..., : self.size]
        pairs = part.view(*part.shape[:-1], 2, self.size // 2)
        swapped = pairs.flip(-2)
        pairs.mul_(self.cos).addcmul_(swapped, self.sin)


class _LayerStep:
    def __init__(self, layer: Layer, rope: _Rope, cache: torch.Tensor, batch: int) -> None:
        a = layer.attention
        self.before_attention, self.before_mlp = (
            norm_op(layer.before_attention, batch),
            norm_op(layer.before_mlp, batch),
        )
        self.after_attention = _optional(layer.after_attention, batch)
        self.after_mlp = _optional(layer.after_mlp, batch)
        self.q_norm, self.k_norm = _optional(a.q_norm), _optional(a.k_norm)
        self.qkv, self.o = joined(a.qkv, batch), bound(a.o, batch)
        self.gate_up, self.down = joined(layer.mlp.gate_up, batch), bound(layer.mlp.down, batch)
        self.act = _activation(layer.mlp.activation)
        self.rope, self.cache, self.attend = rope, cache, attend_op(a, cache)
        self.widens = cache.dtype != layer.before_attention.weight.dtype
        self.shape = (batch, a.heads + 2 * a.kv_heads, a.head_dim)
        self.heads, self.turned = a.heads, a.heads + a.kv_heads
        self.grouped = (batch, a.kv_heads, a.heads // a.kv_heads, a.head_dim)

    def __call__(self, x: torch.Tensor, length: int, mask: torch.Tensor | None) -> torch.Tensor:
        qkv = self.qkv(self.before_attention(x)).view(self.shape)
        if self.q_norm is not None and self.k_norm is not None:
            qkv[:, : self.heads] = self.q_norm(qkv[:, : self.heads])
            qkv[:, self.heads : self.turned] = self.k_norm(qkv[:, self.heads : self.turned])
        self.rope.turn(qkv[:, : self.turned])
        self.cache[:, :, length].copy_(qkv[:, self.heads :])
        q = qkv[:, : self.heads].view(self.grouped)
        if self.widens:
            y = self.attend(q.to(self.cache.dtype), length + 1, mask).to(x.dtype)
        else:
            y = self.attend(q, length + 1, mask)
        y = self.o(y.reshape(self.shape[0], -1))
        if self.after_attention is not None:
            y = self.after_attention(y)
        x = y.add_(x)
        y = self.gate_up(self.before_mlp(x))
        half = y.shape[-1] // 2
        y = self.down(self.act(y[:, :half]).mul_(y[:, half:]))
        if self.after_mlp is not None:
            y = self.after_mlp(y)
        return y.add_(x)


def norm_op(norm: Norm, rows: int = 0) -> Op:
    """RMSNorm of the last dimension with the model's own roundings; ``rows`` is 1 where there is only one row."""
    weight, eps, size = norm.weight.detach(), norm.eps, norm.weight.shape[-1]

    def one_row(x: torch.Tensor) -> torch.Tensor:
        # the factor goes through Python: three small operations instead of eight
        length: float = torch.linalg.vector_norm(x, dtype=torch.float32).item()
        return (x * (1.0 / math.sqrt(length * length / size + eps))).mul_(weight)

    def rows_in_float(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        return wide.mul_(1.0 + weight.float()).to(x.dtype) if norm.offset else wide.to(x.dtype).mul_(weight)

    return one_row if rows == 1 and not norm.offset and weight.device.type == "cpu" else rows_in_float


def _optional(norm: Norm | None, rows: int = 0) -> Op | None:
    return None if norm is None else norm_op(norm, rows)


def _activation(name: str) -> Op:
    known: dict[str, Op] = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
    return known[name]


def padding_mask(pads: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, 1, length] to be added to scores: -inf at padding."""
    hidden = torch.arange(length, device=pads.device) < pads[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=pads.device).masked_fill_(hidden, -math.inf)[:, None, None]


def attend_op(a: Attention, cache: torch.Tensor) -> Callable[[torch.Tensor, int, torch.Tensor | None], torch.Tensor]:
    """Attention over the first tokens of ``cache`` [B, 2 * kv_heads, capacity, D], queries in its dtype."""
    keys, values, window, scaling, softcap = (
        cache[:, : a.kv_heads],
        cache[:, a.kv_heads :],
        a.window,
        a.scaling,
        a.softcap,
    )
    turned = keys.transpose(-1, -2)
    limit = FLASH_LIMIT if cache.device.type == "cpu" and a.head_dim <= 256 else 1 << 62

    def attend(q: torch.Tensor, length: int, mask: torch.Tensor | None) -> torch.Tensor:
        """q [B, kv_heads, G, D]: the G query heads of a key head are rows of one attention, all at one position."""
        begin = 0 if window is None else max(0, length - window)
        if mask is not None and begin:
            mask = mask[..., begin:]
        if softcap is None and length - begin <= limit:
            return F.scaled_dot_product_attention(
                q, keys[:, :, begin:length], values[:, :, begin:length], attn_mask=mask, scale=scaling
            )
        scores = torch.matmul(q, turned[..., begin:length]).mul_(scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap).mul_(softcap)
        if mask is not None:
            scores = scores + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, values[:, :, begin:length])

    return attend


__all__ = ["TorchStep", "attend_op", "norm_op", "padding_mask"]
