"""The static memory of decoding: keys and values of every layer, and rope tables."""

from __future__ import annotations

import torch

from .model import Decoder

STEP = 64  # capacities are multiples of this many tokens
WIDE_BYTES = 1 << 30  # up to which keys and values of 16-bit models are kept in float32 on a CPU
SPARE = 4  # tokens at the end that no generation uses: the runs before a graph's capture write there


def rounded(length: int) -> int:
    """``length`` rounded up to the next capacity."""
    return -(-length // STEP) * STEP


def outside_inference_mode() -> torch.inference_mode:
    """Static tensors are written to both inside and outside of inference mode, so they are made outside."""
    return torch.inference_mode(False)


class Storage:
    """Keys and values of ``batch`` sequences of at most ``capacity`` tokens.

    ``layers[i]`` is [batch, 2 * kv_heads, capacity, head_dim], the keys' heads first, so that one copy writes both; in
    the model's ``dtype``, or float32 (``storage_dtype``).
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int) -> None:
        self.batch, self.capacity = batch, capacity
        self.dtype = storage_dtype(decoder, batch * capacity)
        self.layers: list[torch.Tensor] = []
        with outside_inference_mode():
            for layer in decoder.layers:
                a = layer.attention
                shape = (batch, 2 * a.kv_heads, capacity, a.head_dim)
                # zeros: a masked position is multiplied by a weight of 0, and 0 times garbage may be NaN
                self.layers.append(torch.zeros(shape, dtype=self.dtype, device=decoder.device))
        self.heads = [layer.attention.kv_heads for layer in decoder.layers]

    def keys(self, layer: int) -> torch.Tensor:
        """[batch, kv_heads, capacity, head_dim]."""
        return self.layers[layer][:, : self.heads[layer]]

    def values(self, layer: int) -> torch.Tensor:
        """[batch, kv_heads, capacity, head_dim]."""
        return self.layers[layer][:, self.heads[layer] :]

    def first(self, batch: int) -> Storage:
        """The part of the first ``batch`` sequences, in the same memory."""
        part = object.__new__(Storage)
        part.batch, part.capacity, part.heads, part.dtype = batch, self.capacity, self.heads, self.dtype
        part.layers = [layer[:batch] for layer in self.layers]
        return part


def storage_dtype(decoder: Decoder, tokens: int) -> torch.dtype:
    """float32 on a CPU where that is not much memory: attention is faster in it. Else the model's dtype."""
    if decoder.device.type != "cpu":
        return decoder.dtype
    numbers = sum(2 * layer.attention.kv_heads * layer.attention.head_dim for layer in decoder.layers) * tokens
    return torch.float32 if 4 * numbers <= WIDE_BYTES else decoder.dtype


def rope_tables(decoder: Decoder, capacity: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each kind of layer cosines and sines [capacity, R] of the model's own rotary embedding."""
    with outside_inference_mode(), torch.no_grad():
        return {
            kind: tuple(t.contiguous() for t in make(capacity, decoder.dtype))  # type: ignore[misc]
            for kind, make in decoder.ropes.items()
        }
