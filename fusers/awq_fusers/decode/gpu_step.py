"""The decode step in Triton kernels and bound linears, over static tensors: ready to be captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from awq_core.api import Normed

from .launch import Attend, Pick, add_norm, gated
from .linears import Rows, bound, epilogue, joined, normed
from .model import Decoder, Layer, Mlp, Norm
from .storage import Storage, outside_inference_mode, rope_tables

LONGEST = 8192  # numbers of a row whose norm every program of a linear may take for itself
Pair = tuple[Callable[[Normed], torch.Tensor], Callable[[Normed], torch.Tensor]]


class GpuStep:
    """One token of each sequence: ``tokens`` [B] at position ``length`` [1], both on the device, to logits [B, V]."""

    def __init__(self, decoder: Decoder, storage: Storage) -> None:
        self.decoder, self.batch = decoder, storage.batch
        batch, device = storage.batch, decoder.device
        with outside_inference_mode(), torch.no_grad():
            self.length = torch.zeros(1, dtype=torch.int32, device=device)
            self.pads = torch.zeros(batch, dtype=torch.int32, device=device)
            self.pick = Pick(batch, storage.capacity, self.length)
            self.tokens = self.pick.tokens
            tables = rope_tables(decoder, storage.capacity)
            scratch: dict[tuple[int, ...], tuple[torch.Tensor, ...]] = {}
            self.attends = [
                Attend(layer.attention, cache, *tables[layer.attention.rope], self.length, self.pads, scratch)
                for layer, cache in zip(decoder.layers, storage.layers, strict=True)
            ]
        self.linears = [linears(layer, batch) for layer in decoder.layers]
        self.head = bound(decoder.head, batch)
        self.normed = normed_linears(decoder) if batch == 1 else None

    def logits(self) -> torch.Tensor:
        """The step; ``length`` stays."""
        decoder, layers = self.decoder, self.decoder.layers
        x = embedded(decoder, self.tokens)
        h = torch.empty_like(x)
        if self.normed is not None:
            return capped(self.head(self._through_normed(x, h, self.normed)), decoder.softcap)
        add_norm(None, x, layers[0].before_attention, h)
        for layer, attend, (qkv, o, gated_up, down), after in zip(
            layers, self.attends, self.linears, following(decoder), strict=True
        ):
            add_norm(o(attend(qkv(h))), x, layer.before_mlp, h, layer.after_attention)
            add_norm(down(gated_up(h)), x, after, h, layer.after_mlp)
        return capped(self.head(h), decoder.softcap)

    def _through_normed(self, x: torch.Tensor, other: torch.Tensor, pairs: list[Pair]) -> torch.Tensor:
        """The layers where linears make their rows themselves; the stream goes to and fro between x and ``other``."""
        y: torch.Tensor | None = None
        for layer, attend, (qkv, gated_up), (_, o, _, down) in zip(
            self.decoder.layers, self.attends, pairs, self.linears, strict=True
        ):
            values = attend(qkv(_normed(x, y, layer.before_attention, other)))
            if y is not None:
                x, other = other, x
            y = o(values)
            gate = gated_up(_normed(x, y, layer.before_mlp, other))
            x, other = other, x
            y = down(gate)
        return add_norm(y, x, self.decoder.norm, other)

    def advance(self) -> torch.Tensor:
        """The step, and ``length`` is one more."""
        logits = self.logits()
        self.length += 1
        return logits

    def greedy(self) -> None:
        """The step and the choice of the next tokens: ``pick`` holds them, ``length`` is one more."""
        self.pick(self.logits())


def embedded(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [M] to [M, H], scaled where the model does."""
    x = F.embedding(tokens, decoder.embedding)
    return x if decoder.embedding_scale is None else x * decoder.embedding_scale


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Soft cap of the logits."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _normed(x: torch.Tensor, plus: torch.Tensor | None, norm: Norm, out: torch.Tensor) -> Normed:
    return Normed(x, plus, norm.weight, norm.eps, norm.offset, out)


def normed_linears(decoder: Decoder) -> list[Pair] | None:
    """qkv and gate-up of each layer as kernels that take their norm in; None unless all layers have both."""
    found = []
    for layer in decoder.layers:
        norms = (layer.before_attention, layer.before_mlp)
        plain = (
            layer.after_attention is None
            and layer.after_mlp is None
            and _gates_by_silu(layer.mlp)
            and all(norm.weight.dtype == decoder.dtype and norm.weight.numel() <= LONGEST for norm in norms)
        )
        qkv = normed(layer.attention.qkv) if plain else None
        gate_up = epilogue(layer.mlp.gate_up, 1, "norm_silu_mul") if plain else None
        if qkv is None or gate_up is None:
            return None
        found.append((qkv, gate_up))
    return found


def _gates_by_silu(mlp: Mlp) -> bool:
    """Whether a linear's kernel can apply the activation: tiles of gate and up are 16 columns each."""
    return mlp.activation == "silu" and getattr(mlp.down, "in_features", 1) % 16 == 0


def linears(layer: Layer, rows: int) -> tuple[Rows, Rows, Rows, Rows]:
    """qkv, o, gate-up with the activation, and down of a layer for ``rows`` rows."""
    a, mlp = layer.attention, layer.mlp
    return joined(a.qkv, rows), bound(a.o, rows), gated_up(mlp, rows), bound(mlp.down, rows)


def gated_up(mlp: Mlp, rows: int) -> Rows:
    """x [M, K] to ``activation(x gate) * (x up)`` [M, I]: in one kernel where there is one."""
    whole = epilogue(mlp.gate_up, rows, "silu_mul") if _gates_by_silu(mlp) else None
    if whole is not None:
        return whole
    gate_up = joined(mlp.gate_up, rows)
    return lambda x: gated(gate_up(x), mlp.activation)


def following(decoder: Decoder) -> list[Norm]:
    """For each layer the norm that comes after it."""
    return [*(layer.before_attention for layer in decoder.layers[1:]), decoder.norm]
