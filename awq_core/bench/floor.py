"""The bytes that one decode step must read, and the tokens per second that the memory allows at most."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..experts import AwqExperts
from ..layouts import checkpoint_layout
from ..packed import PackedModule, PackedWeight


def weight_bytes(model: Any, batch_size: int) -> float:
    """Bytes of weights that one step of ``batch_size`` tokens reads.

    Quantized weights count as they are stored (codes, scales and zeros), whatever layout is bound. A table of input
    embeddings does not count, of which a step reads one row a token, unless it is the output embedding too. Of the
    experts of a block count as many as ``batch_size`` tokens reach on average, if they choose evenly.
    """
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    seen: set[int] = set()
    total = 0.0
    for module in model.modules():
        share = _share(module, model.config.get_text_config(), batch_size)
        packed = list(module.packed.values()) if isinstance(module, PackedModule) else []
        total += share * sum(map(_stored_bytes, packed))
        skipped = {w.prefix + suffix for w in packed for suffix in w.suffixes}
        for name, tensor in module.named_parameters(recurse=False):
            if name in skipped or id(tensor) in seen or (module is embeddings and not _is_head(tensor, head)):
                continue
            seen.add(id(tensor))
            total += share * tensor.numel() * tensor.element_size()
    return total


def cache_bytes(config: Any, batch_size: int, length: float, dtype: torch.dtype) -> float:
    """Bytes of keys and values that one step reads where ``length`` tokens of each sequence are cached."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    tokens = sum(min(length, window) if window and kind == "sliding_attention" else length for kind in kinds)
    return float(2 * batch_size * heads * head_dim * tokens * dtype.itemsize)


def floor_from(weights: float, model: Any, batch_size: int, length: float, bandwidth: float) -> float:
    """The most tokens per second that ``bandwidth`` (bytes/s) allows, with ``length`` tokens cached on average.

    ``weights`` are the bytes of ``weight_bytes(model, batch_size)``.
    """
    read = weights + cache_bytes(model.config, batch_size, length, model.dtype)
    return float(batch_size * bandwidth / read)


def _stored_bytes(weight: PackedWeight) -> int:
    spec = weight.spec
    shapes = checkpoint_layout(spec.layout).shapes(spec.in_features, spec.out_features, spec.group_size)
    one = 0
    for shape in shapes.values():
        kind = getattr(torch, shape.dtypes[0])
        one += torch.Size(shape.shape).numel() * kind.itemsize
    return one * max(1, spec.experts)


def _share(module: nn.Module, config: Any, batch_size: int) -> float:
    """The part of a module's weights that a step reads: 1, but less of experts."""
    count = module.num_experts if isinstance(module, AwqExperts) else _dense_experts(module)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not count or not chosen:
        return 1.0
    return float(1 - (1 - chosen / count) ** batch_size)


def _dense_experts(module: nn.Module) -> int:
    """The number of experts that a module stacks in 3-D weights, else 0."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return len(weights[0]) if all(isinstance(w, torch.Tensor) and w.ndim == 3 for w in weights) else 0  # type: ignore[arg-type]


def _is_head(tensor: torch.Tensor, head: Any) -> bool:
    return head is not None and tensor is getattr(head, "weight", None)
