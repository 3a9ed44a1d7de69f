"""Pairs of models from one tiny checkpoint: as it loads, and fused; in float32 on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import awq_core
from awq_core.hf import decode
from awq_core.hf.quantize import quantize
from awq_core.testing.tiny import ARCHITECTURES, SMALL

PASSED = "ignore:You passed `quantization_config`:UserWarning"
LIMIT = 96

ROPE = {"rope_theta": 10000.0}
# Models by name: config class and sizes. What each shows of attention or rope stands beside it.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **ARCHITECTURES,
    "llama_mqa": ("LlamaConfig", SMALL | {"num_key_value_heads": 1, "head_dim": 32}),
    "llama_mha": ("LlamaConfig", SMALL | {"num_key_value_heads": 4}),
    "llama3_rope": (
        "LlamaConfig",
        SMALL
        | {
            "rope_parameters": ROPE
            | {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "yarn_rope": (
        "LlamaConfig",
        SMALL
        | {
            "rope_parameters": ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.1}
        },
    ),
    "dynamic_rope": (
        "LlamaConfig",
        SMALL | {"max_position_embeddings": 16, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "gemma": ("GemmaConfig", SMALL | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 16, "sliding_window": 8}),  # soft-capping
    "gemma3_text": ("Gemma3TextConfig", SMALL | {"head_dim": 16, "sliding_window": 8}),  # two ropes
    "phi3": ("Phi3Config", SMALL | {"pad_token_id": 0}),  # packed
    "falcon_alibi": ("FalconConfig", ARCHITECTURES["falcon"][1] | {"alibi": True}),
    "mpt": ("MptConfig", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "starcoder2": ("Starcoder2Config", SMALL),
    "qwen3_moe_dense_first": (
        "Qwen3MoeConfig",
        ARCHITECTURES["qwen3_moe"][1] | {"mlp_only_layers": [0], "num_hidden_layers": 2},
    ),
}


@pytest.fixture(autouse=True)
def enabled():
    """Each test starts with awq-core enabled, and leaves transformers as it was."""
    transformers.utils.logging.disable_progress_bar()
    awq_core.enable()
    yield
    awq_core.disable()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """``folder_of("gemma2", layout="gemv", ...)``: a checkpoint of a model of MODELS, made once; don't change it."""
    made: dict[tuple, Path] = {}

    def make(name: str, group_size: int = 32, **options: Any) -> Path:
        key = (name, group_size, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            kind, sizes = MODELS[name]
            folder = tmp_path_factory.mktemp(name)
            config = getattr(transformers, kind)(**sizes)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
            # The tiny initialisation makes attention flat: wider weights let every position and head matter.
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.data *= 4
                elif name in BIASED:
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder / "dense")
            made[key] = quantize(folder / "dense", folder / "awq", group_size=group_size, method="rtn", **options).out
        return made[key]

    return make


BIASED = {"llama_bias", "qwen2"}


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """As a user loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@pytest.fixture(scope="session")
def load_model():
    """``load_model(folder, **options)``: ``from_pretrained``, in float32 unless a dtype is given."""
    return load


@pytest.fixture(scope="session")
def pair(folder_of):
    """``pair("llama")``: the model as it loads and the fused one, made once; a test must not change them.

    ``step=False`` takes the fast decode step off, so that every token goes through the model's own forward.
    """
    made: dict[tuple, tuple[Any, Any]] = {}

    def make(name: str = "llama", step: bool = True, **options: Any) -> tuple[Any, Any]:
        key = (name, step, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            folder = folder_of(name)
            config = awq_core.AwqConfig(bits=4, do_fuse=True, fuse_max_seq_len=LIMIT)
            made[key] = load(folder, **options), load(folder, quantization_config=config, **options)
            if not step:
                decode.detach(made[key][1])
        return made[key]

    return make


@pytest.fixture
def fresh(pair):
    """``fresh("llama")``: the same, as copies that a test may change."""
    return lambda *args, **options: copy.deepcopy(pair(*args, **options))


@pytest.fixture(scope="session")
def prompt():
    """``prompt(batch, length)``: ids and the mask of a prompt whose rows are padded on the left by 0, 3, 6, ..."""

    def make(batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        for row in range(batch):
            mask[row, : min(3 * row, length - 2)] = 0
        return {"input_ids": ids * mask, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def tokens():
    """``tokens(model, inputs, **options)``: what generate answers; the end token stops nothing."""

    def run(model: Any, inputs: dict[str, Any], new: int = 12, **options: Any) -> list[list[int]]:
        wanted = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": new} | options
        return model.generate(**inputs, **wanted).tolist()

    return run
