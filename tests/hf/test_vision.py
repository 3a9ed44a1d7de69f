"""A vision-language checkpoint: its names are renamed on loading, and its vision tower stays dense."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.linear import AwqLinear
from awq_core.quantization.rtn import quantize_weight

TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(AWQ checkpoint, dense model with the same weights) of a tiny Llava, in the names that its hub files have."""
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        vision_config=transformers.CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=32),
        image_token_id=63,
    )
    dense, awq = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("awq")
    transformers.LlavaForConditionalGeneration(config).save_pretrained(dense)
    weights = load_file(dense / "model.safetensors")
    stored = dict(weights)
    for key in [key for key in weights if "language_model" in key and key.endswith("_proj.weight")]:
        codes = quantize_weight(stored.pop(key), 32)
        name = key.removesuffix("weight")
        stored |= {name + suffix: tensor for suffix, tensor in checkpoint_layout("gemm").pack(codes).items()}
        weights[key] = dequantize(codes, torch.float32).T.contiguous()
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    save_file(stored, awq / "model.safetensors", {"format": "pt"})
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "modules_to_not_convert": ["visual"]}
    raw = json.loads((dense / "config.json").read_text()) | {"quantization_config": said}
    (awq / "config.json").write_text(json.dumps(raw))
    return awq, dense


def test_renamed_prefixes(folders, assert_close, tmp_path):
    awq, dense = folders
    stored = load_file(awq / "model.safetensors")
    assert any(
        name.startswith("language_model.model.") for name in stored
    )  # and not model.language_model, as in memory
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    model, oracle = load(awq, dtype=torch.float32), load(dense, dtype=torch.float32)
    assert isinstance(model.model.language_model.layers[0].self_attn.q_proj, AwqLinear)
    assert len([m for m in model.modules() if isinstance(m, AwqLinear)]) == 7
    assert not [m for m in model.model.vision_tower.modules() if isinstance(m, AwqLinear)]
    assert type(model.model.multi_modal_projector.linear_1) is nn.Linear
    ids = torch.tensor([[1, 63, 63, 63, 63, 2, 3]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(
            model(input_ids=ids, pixel_values=pixels).logits, oracle(input_ids=ids, pixel_values=pixels).logits
        )
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)
