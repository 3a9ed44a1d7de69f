"""Tiny models with random weights, dense and quantized, for tests that need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Each architecture by its transformers config class, with the sizes that keep it tiny.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama_bias": ("LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 16}),
    "falcon": (
        "FalconConfig",
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SMALL | EXPERTS | {"head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}


def tiny_model(folder: Path, architecture: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save a dense float16 model of ``architecture`` (a key of ARCHITECTURES) into ``folder``; returns it."""
    import torch
    import transformers

    name, sizes = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(**(sizes | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    return folder


def tiny_checkpoint(folder: Path, architecture: str = "llama", group_size: int = 32, **options: Any) -> Path:
    """A dense tiny model in ``folder/dense`` and its AWQ checkpoint in ``folder/awq``; returns the latter.

    ``options`` go to ``awq_core.hf.quantize.quantize``.
    """
    from ..hf.quantize import quantize

    dense = tiny_model(folder / "dense", architecture)
    return quantize(dense, folder / "awq", group_size=group_size, **{"method": "rtn", **options}).out
