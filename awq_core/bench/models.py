"""Models to measure: known configurations with random weights, so that no download is needed.

The sizes are those of the models' own config.json. Mistral is version 0.2 and later, which have no sliding window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "llama-3-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "eos_token_id": 151645,
        },
    ),
    "yi-34b": (
        "llama",
        {
            "vocab_size": 64000,
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "num_hidden_layers": 60,
            "num_attention_heads": 56,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "sliding_window": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "tinyllama": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def named_config(name: str, layers: int | None = None) -> Any:
    """The transformers config called ``name`` (a key of CONFIGS), cut to ``layers`` layers; ConfigError if unknown."""
    from ..hf.random_weights import make_config

    if name not in CONFIGS:
        raise ConfigError(f"there is no configuration called {name!r}: choose {', '.join(CONFIGS)}")
    model_type, sizes = CONFIGS[name]
    if layers is not None and layers < 1:
        raise ConfigError(f"layers is {layers}: a model has one at least")
    cut = {} if layers is None else {"num_hidden_layers": layers}
    return make_config(model_type, sizes | cut)


def random_awq_model(
    config: Any,
    *,
    group_size: int = 128,
    layout: str = "gemm",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
    fuse_max_seq_len: int | None = None,
) -> Any:
    """An AWQ model with random weights, bound, in eval mode, made on ``device`` without ever holding a dense one.

    ``config`` is a key of CONFIGS or a transformers config (``layers`` cuts only the former). ``dtype`` is that of the
    activations, by default float16 on a GPU and bfloat16 on a CPU; with ``fuse_max_seq_len`` the model is fused, as
    ``AwqConfig(do_fuse=True, fuse_max_seq_len=...)`` makes it. Errors are those of ``hf.random_weights``.
    """
    from ..hf.random_weights import random_model

    config = named_config(config, layers) if isinstance(config, str) else config
    return random_model(
        config,
        quantized=True,
        group_size=group_size,
        layout=layout,
        dtype=dtype or default_dtype(device),
        device=device,
        seed=seed,
        fuse_max_seq_len=fuse_max_seq_len,
    )


def random_dense_model(
    config: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    layers: int | None = None,
    seed: int = 0,
) -> Any:
    """The same model dense, for comparison; it takes four times the memory."""
    from ..hf.random_weights import random_model

    config = named_config(config, layers) if isinstance(config, str) else config
    return random_model(config, quantized=False, dtype=dtype or default_dtype(device), device=device, seed=seed)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """float16 on a GPU, as AWQ checkpoints say; bfloat16 on a CPU, where float16 is slow."""
    import torch

    return torch.bfloat16 if torch.device(device).type == "cpu" else torch.float16
