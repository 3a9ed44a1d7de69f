"""The same model with its channels in another order: what hides that its weights came from a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def permuted(source: Path, seed: int, out: Path) -> Path:
    """The same function with its channels in another order: residual stream, MLP and each kv head."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden_size, generator=generator)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv = config.num_attention_heads, config.num_key_value_heads

    def take(tensor: torch.Tensor, order: torch.Tensor, axis: int) -> None:
        tensor.data = tensor.data.index_select(axis, order).contiguous()

    take(model.model.embed_tokens.weight, hidden, 1)
    if not config.tie_word_embeddings:
        take(model.lm_head.weight, hidden, 1)
    take(model.model.norm.weight, hidden, 0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for name, norm in layer.named_children():  # Gemma has two more, around the MLP
            if name.endswith("layernorm"):
                take(norm.weight, hidden, 0)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            take(linear.weight, hidden, 1)
        for linear in (attention.o_proj, mlp.down_proj):
            take(linear.weight, hidden, 0)
        inner = torch.randperm(config.intermediate_size, generator=generator)
        take(mlp.gate_proj.weight, inner, 0)
        take(mlp.up_proj.weight, inner, 0)
        take(mlp.down_proj.weight, inner, 1)
        orders = [torch.randperm(size, generator=generator) for _ in range(kv)]
        take(attention.v_proj.weight, torch.cat([i * size + order for i, order in enumerate(orders)]), 0)
        from_v = torch.cat([i * size + orders[i * kv // heads] for i in range(heads)])
        take(attention.o_proj.weight, from_v, 1)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out
