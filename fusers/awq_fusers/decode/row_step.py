"""The decode step for one sequence on a CPU: what lies between the linears in numpy, in float32.

One row of a small model is a few thousand numbers an operation, so the call is what costs: a microsecond or three in
torch, half of one in numpy. Linears, the head and long attention stay torch's. Activations between the linears are
float32, so that the model's dtype rounds less often than in its own forward. Numpy's arrays and torch's tensors are two
views of the same memory, made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray

from .head import head_op
from .linears import Rows, bound, joined
from .model import Decoder, Layer, Norm
from .step import TorchStep, attend_op
from .storage import Storage, outside_inference_mode, rope_tables

Array = NDArray[np.float32]
NUMPY_BYTES = 1 << 19  # of keys and values in one attention; above, torch's two threads are faster


class RowStep:
    """``step(tokens [1], length, pads)`` over a float32 ``storage`` of one sequence, as ``TorchStep``."""

    batch = 1

    def __init__(self, decoder: Decoder, storage: Storage) -> None:
        self.decoder, self.storage = decoder, storage
        self.embedding, self.scale = decoder.embedding, decoder.embedding_scale
        self.softcap = decoder.softcap
        with outside_inference_mode(), torch.no_grad():
            self.x_tensor = torch.zeros(1, self.embedding.shape[1])
            self.x: Array = self.x_tensor.numpy()[0]
            self.ropes = {kind: _Rope(cos, sin) for kind, (cos, sin) in rope_tables(decoder, storage.capacity).items()}
            self.layers = [
                _RowLayer(layer, self.ropes[layer.attention.rope], storage.layers[i], decoder.dtype)
                for i, layer in enumerate(decoder.layers)
            ]
            self.norm = _norm(decoder.norm)
            self.head_in = _Input(decoder.norm.weight.shape[0], decoder.dtype)
        self.head = head_op(decoder.head, 1, decoder.int8_head)
        self._padded: TorchStep | None = None

    def __call__(self, tokens: torch.Tensor, length: int, pads: torch.Tensor | None) -> torch.Tensor:
        """``length`` tokens are cached; ``pads`` [1] is how many of them are padding at the left (None: none)."""
        if pads is not None:
            if self._padded is None:
                self._padded = TorchStep(self.decoder, self.storage)
            return self._padded(tokens, length, pads)
        row = F.embedding(tokens, self.embedding)
        self.x_tensor.copy_(row if self.scale is None else row * self.scale)
        for rope in self.ropes.values():
            rope.at(length)
        with np.errstate(over="ignore"):  # exp of a large number in silu: its inverse is 0, as it should be
            for layer in self.layers:
                layer(self.x, length)
        self.norm(self.x, self.head_in.wide)
        logits = self.head(self.head_in.rounded())
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class _Input:
    """Where the input of a linear is written, [size] in float32, and the same as its [1, size] in the model's dtype."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.tensor = torch.zeros(1, size)
        self.wide: Array = self.tensor.numpy()[0]
        self.narrow = self.tensor if dtype == torch.float32 else torch.zeros(1, size, dtype=dtype)

    def rounded(self) -> torch.Tensor:
        return self.narrow if self.narrow is self.tensor else self.narrow.copy_(self.tensor)


class _Output:
    """Where the output of a linear goes: [size] in float32."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.zeros(1, size)
        self.wide: Array = self.tensor.numpy()[0]


class _Linear:
    """From ``inp.wide`` to ``out.wide``."""

    def __init__(self, run: Rows, in_features: int, dtype: torch.dtype) -> None:
        self.run, self.inp = run, _Input(in_features, dtype)
        self.out = _Output(run(self.inp.narrow).shape[-1])

    def __call__(self) -> Array:
        self.out.tensor.copy_(self.run(self.inp.rounded()))
        return self.out.wide


class _Rope:
    """Cosines and sines [2, R/2] of one position; the sines of the first half are negative."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self.size = cos.shape[-1]
        self.all_cos: Array = cos.float().view(-1, 2, self.size // 2).numpy()
        signed = sin.float().view(-1, 2, self.size // 2).clone()
        signed[:, 0].neg_()
        self.all_sin: Array = signed.numpy()
        self.cos, self.sin = self.all_cos[0], self.all_sin[0]

    def at(self, length: int) -> None:
        """Take the position of the next token."""
        self.cos, self.sin = self.all_cos[length], self.all_sin[length]


class _RowLayer:
    def __init__(self, layer: Layer, rope: _Rope, cache: torch.Tensor, dtype: torch.dtype) -> None:
        a, mlp = layer.attention, layer.mlp
        hidden, heads, groups = layer.before_attention.weight.shape[0], a.heads + 2 * a.kv_heads, a.heads // a.kv_heads
        self.rope, self.window, self.softcap = rope, a.window, a.softcap
        self.kv, self.scaling = a.kv_heads, np.float32(a.scaling)
        self.before_attention, self.before_mlp = _norm(layer.before_attention), _norm(layer.before_mlp)
        self.after_attention = None if layer.after_attention is None else _norm(layer.after_attention)
        self.after_mlp = None if layer.after_mlp is None else _norm(layer.after_mlp)
        self.qkv = _Linear(joined(a.qkv, 1), hidden, dtype)
        self.o = _Linear(bound(a.o, 1), a.heads * a.head_dim, dtype)
        y = self.qkv.out.wide.reshape(heads, a.head_dim)
        self.q, self.k, self.new = y[: a.heads], y[a.heads : a.heads + a.kv_heads], y[a.heads :]
        self.q_norm = None if a.q_norm is None else _head_norm(a.q_norm)
        self.k_norm = None if a.k_norm is None else _head_norm(a.k_norm)
        turned = y[: a.heads + a.kv_heads, : rope.size]
        outer, inner = turned.strides
        self.pairs: Array = np.lib.stride_tricks.as_strided(
            turned, (turned.shape[0], 2, rope.size // 2), (outer, inner * (rope.size // 2), inner)
        )
        self.swapped: Array = self.pairs[:, ::-1]
        self.spare: Array = np.empty(self.pairs.shape, np.float32)
        self.queries: Array = self.q.reshape(a.kv_heads, groups, a.head_dim)
        self.cache: Array = cache.numpy()[0]
        self.keys, self.values = self.cache[: a.kv_heads].transpose(0, 2, 1), self.cache[a.kv_heads :]
        self.attended: Array = self.o.inp.wide.reshape(a.kv_heads, groups, a.head_dim)
        self.few_keys = NUMPY_BYTES // (2 * a.kv_heads * a.head_dim * 4)
        self.attend = attend_op(a, cache)
        self.q_tensor = self.qkv.out.tensor[:, : a.heads * a.head_dim].view(1, a.kv_heads, groups, a.head_dim)
        self.gate_up = _Linear(joined(mlp.gate_up, 1), hidden, dtype)
        self.down = _Linear(bound(mlp.down, 1), self.gate_up.out.wide.shape[0] // 2, dtype)
        self.gated = _gated(mlp.activation, self.gate_up.out, self.down.inp)

    def __call__(self, x: Array, length: int) -> None:
        self.before_attention(x, self.qkv.inp.wide)
        self.qkv()
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(self.q)
            self.k_norm(self.k)
        np.multiply(self.swapped, self.rope.sin, self.spare)
        np.multiply(self.pairs, self.rope.cos, self.pairs)
        np.add(self.pairs, self.spare, self.pairs)
        self.cache[:, length] = self.new
        self._attention(length + 1)
        y = self.o()
        if self.after_attention is not None:
            self.after_attention(y, y)
        np.add(x, y, x)
        self.before_mlp(x, self.gate_up.inp.wide)
        self.gate_up()
        self.gated()
        y = self.down()
        if self.after_mlp is not None:
            self.after_mlp(y, y)
        np.add(x, y, x)

    def _attention(self, length: int) -> None:
        """The query heads over ``length`` cached keys, to the input of ``o``."""
        begin = 0 if self.window is None else max(0, length - self.window)
        if length - begin > self.few_keys:
            self.o.inp.tensor.copy_(self.attend(self.q_tensor, length, None).reshape(1, -1))
            return
        np.multiply(self.queries, self.scaling, self.queries)
        scores = np.matmul(self.queries, self.keys[:, :, begin:length])
        if self.softcap is not None:
            scores = np.tanh(scores / self.softcap) * np.float32(self.softcap)
        scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
        np.exp(scores, scores)
        np.matmul(scores, self.values[:, begin:length], self.attended)
        self.attended /= np.add.reduce(scores, axis=-1, keepdims=True)


def _weight(norm: Norm) -> Array:
    weight: Array = norm.weight.detach().float().numpy()
    return weight + np.float32(1) if norm.offset else weight


def _norm(norm: Norm) -> Callable[[Array, Array], None]:
    """RMSNorm of [size] into another array of that size, or the same one."""
    weight, eps, size = _weight(norm), norm.eps, norm.weight.shape[0]

    def run(x: Array, out: Array) -> None:
        factor = 1.0 / math.sqrt(float(np.dot(x, x)) / size + eps)
        np.multiply(x, factor, out)
        np.multiply(out, weight, out)

    return run


def _head_norm(norm: Norm) -> Callable[[Array], None]:
    """RMSNorm of each row of [H, D], in place."""
    weight, eps, size = _weight(norm), np.float32(norm.eps), np.float32(norm.weight.shape[0])

    def run(x: Array) -> None:
        factors = 1 / np.sqrt(np.einsum("hd,hd->h", x, x) / size + eps)
        np.multiply(x, factors[:, None], x)
        np.multiply(x, weight, x)

    return run


def _gated(activation: str, both: _Output, into: _Input) -> Callable[[], None]:
    """``act(gate) * up``, where ``both`` holds gate and up side by side."""
    size = into.wide.shape[0]
    gate, up, out = both.wide[:size], both.wide[size:], into.wide

    def silu() -> None:
        np.negative(gate, out)
        np.exp(out, out)
        np.add(out, 1, out)
        np.divide(gate, out, out)
        np.multiply(out, up, out)

    def gelu() -> None:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.mul(F.gelu(both.tensor[:, :size], approximate=approximate), both.tensor[:, size:], out=into.tensor)

    return silu if activation == "silu" else gelu


__all__ = ["RowStep"]
