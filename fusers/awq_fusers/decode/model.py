"""What a decoder is to the decode step: modules, tensors and numbers, read once from a model (``families.py``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Rope = Callable[[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]]


class Unsupported(Exception):  # noqa: N818
    """Why a model has no fast decode step; the text completes "because ..."."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last dimension. ``offset``: the factor is ``1 + weight`` and rounding comes last (Gemma)."""

    weight: torch.Tensor
    eps: float
    offset: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention block. ``qkv`` are linears whose outputs side by side are query, key and value heads.

    ``window``: keys that a query sees, itself included (None: all); ``softcap``: of the scores before the softmax;
    ``rope``: the kind of layer whose cosines it uses.
    """

    qkv: tuple[nn.Module, ...]
    o: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rope: str = ""


@dataclass(frozen=True)
class Mlp:
    """Gate and up (outputs side by side), activation (``silu``, ``gelu`` or ``gelu_tanh``) and down."""

    gate_up: tuple[nn.Module, ...]
    down: nn.Module
    activation: str = "silu"


@dataclass(frozen=True)
class Layer:
    """One decoder layer: ``x += after_attention(attention(before_attention(x)))``, and the same for the MLP."""

    before_attention: Norm
    attention: Attention
    before_mlp: Norm
    mlp: Mlp
    after_attention: Norm | None = None
    after_mlp: Norm | None = None


@dataclass(frozen=True)
class Decoder:
    """A whole decoder. ``ropes`` gives for each kind of layer the function ``(length, dtype) -> (cos, sin)`` [S, R].

    ``int8_head``: the user lets the head be read in 8 bits where that is faster.
    """

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Module
    ropes: dict[str, Rope]
    embedding_scale: torch.Tensor | None = None
    softcap: float | None = None
    int8_head: bool = False

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.embedding.dtype
