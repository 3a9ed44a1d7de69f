"""The architectures that ``do_fuse=True`` knows. None of them is matched by attribute names: each path is said."""

from __future__ import annotations

from awq_core.api import FusingMapping

# The same names everywhere, and whatever else these differ in (q/k norms, soft-capping, windows, biases, rope) is the
# model's own code, which stays.
LLAMA_LIKE = (
    "llama",  # Yi, too
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3",
    "qwen3_vl_text",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "smollm3",
    "olmo",
    "olmo2",
    "olmo3",
    "cohere",
    "cohere2",
    "stablelm",
    "internlm3",
)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe")

MAPPINGS = (
    FusingMapping(LLAMA_LIKE),
    # Layers with experts have none of the MLP's names; those without experts (Qwen's mlp_only_layers) have them.
    FusingMapping(EXPERTS),
    FusingMapping(("starcoder2",), mlp=()),
    FusingMapping(
        ("phi3",),
        attention=("self_attn.qkv_proj", "self_attn.o_proj"),
        mlp=("mlp.gate_up_proj", "mlp.down_proj"),
    ),
    FusingMapping(
        ("falcon", "bloom"),
        attention=("self_attention.query_key_value", "self_attention.dense"),
        mlp=(),
        layers="h",
    ),
    FusingMapping(("mpt",), attention=("attn.Wqkv", "attn.out_proj"), mlp=(), layers="blocks"),
)
