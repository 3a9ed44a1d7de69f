"""What we rely on in transformers and its documentation does not promise.

When a release moves it, one test here says so. The names stand in ``awq_core/hf/_compat.py``.
"""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import AwqConfig as StockConfig

import awq_core
from awq_core.hf import _compat, enable
from awq_core.hf.config import METHODS, AwqConfig
from awq_core.hf.quantizer import AwqCoreQuantizer


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def stock(name: str):
    """A function of modeling_utils as transformers has it."""
    return inspect.unwrap(getattr(_compat.modeling_utils, name))


def test_all_names_are_there():
    assert _compat.missing_names() == []


def test_what_is_missing_is_named(monkeypatch):
    awq_core.disable()
    monkeypatch.delitem(_compat.QUANTIZERS, "awq")
    monkeypatch.delattr(_compat.modeling_utils, "_get_dtype")
    monkeypatch.setattr(transformers, "__version__", "5.16.0")
    with pytest.raises(awq_core.AwqError) as error:
        awq_core.enable()
    assert "transformers 5.17 or later (found 5.16.0)" in str(error.value)
    assert 'AUTO_QUANTIZER_MAPPING["awq"]' in str(error.value)
    assert "transformers.modeling_utils._get_dtype" in str(error.value)
    assert not enable._undo


def test_the_mappings_hold_classes_by_method():
    awq_core.disable()
    assert _compat.CONFIGS["awq"] is StockConfig
    assert issubclass(_compat.QUANTIZERS["awq"], _compat.HfQuantizer)


def test_the_methods_that_we_replace_are_those_of_the_class_or_its_bases():
    awq_core.disable()
    for name in METHODS:
        assert callable(getattr(StockConfig, name)), name


def test_get_dtype_takes_the_dtype_first_and_the_quantizer_last():
    names = parameters(stock("_get_dtype"))
    assert names[0] == "dtype"
    assert names[-1] == "hf_quantizer"


def test_get_hf_quantizer_takes_the_config_first():
    assert parameters(stock("get_hf_quantizer"))[:3] == ["config", "quantization_config", "device_map"]


def test_modeling_utils_looks_both_functions_up_when_it_calls_them():
    called = transformers.PreTrainedModel.from_pretrained.__func__
    assert called.__globals__ is _compat.modeling_utils.__dict__
    assert {"_get_dtype", "get_hf_quantizer"} <= set(inspect.unwrap(called).__code__.co_names)


def test_configs_merge_by_class_name_and_take_the_loading_attributes():
    awq_core.disable()
    stored = AwqConfig.from_dict({"quant_method": "awq", "bits": 4, "group_size": 64})
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        merged = AutoHfQuantizer.merge_quantization_configs(stored, AwqConfig(version="cpu"))
    assert merged is stored
    assert merged.options.version == "cpu"
    assert merged.group_size == 64

    class OtherName(AwqConfig):
        pass

    with pytest.raises(ValueError, match="is quantized with AwqConfig but you are passing a OtherName"):
        AutoHfQuantizer.merge_quantization_configs(stored, OtherName())


def test_our_config_is_one_that_has_loading_attributes():
    from transformers.quantizers.auto import LOADING_ATTRIBUTES_CONFIG_TYPES

    assert isinstance(AwqConfig(), LOADING_ATTRIBUTES_CONFIG_TYPES)


def test_the_order_of_the_hooks(checkpoint, load, monkeypatch):
    calls: list[str] = []
    arguments: dict[str, set[str]] = {}

    def spy(name, method):
        def called(self, *args, **kwargs):
            calls.append(name)
            arguments.setdefault(name, set(kwargs))
            return method(self, *args, **kwargs)

        return called

    for name in (
        "validate_environment",
        "update_dtype",
        "preprocess_model",
        "_process_model_before_weight_loading",
        "update_weight_conversions",
        "postprocess_model",
        "_process_model_after_weight_loading",
    ):
        monkeypatch.setattr(AwqCoreQuantizer, name, spy(name, getattr(AwqCoreQuantizer, name)))
    model = load(checkpoint(), device_map="cpu")
    assert list(dict.fromkeys(calls)) == [
        "validate_environment",
        "update_dtype",
        "preprocess_model",
        "_process_model_before_weight_loading",
        "update_weight_conversions",
        "postprocess_model",
        "_process_model_after_weight_loading",
    ]
    assert "device_map" in arguments["validate_environment"]
    assert "checkpoint_files" in arguments["_process_model_before_weight_loading"]
    assert type(model.hf_quantizer) is AwqCoreQuantizer


def test_the_model_is_on_meta_and_knows_its_dtype_before_loading(checkpoint, load, monkeypatch):
    seen = []
    before = AwqCoreQuantizer._process_model_before_weight_loading

    def spy(self, model, **kwargs):
        seen.append(({p.device.type for p in model.parameters()}, model.config.dtype, kwargs["checkpoint_files"]))
        return before(self, model, **kwargs)

    monkeypatch.setattr(AwqCoreQuantizer, "_process_model_before_weight_loading", spy)
    load(checkpoint(), dtype=torch.float32)
    assert seen == [({"meta"}, torch.float32, [str(checkpoint() / "model.safetensors")])]


def test_a_quantizer_is_told_whether_the_model_is_quantized(monkeypatch):
    names = parameters(_compat.HfQuantizer.__init__)
    assert names == ["self", "quantization_config", "kwargs"]
    with pytest.raises(awq_core.ConfigError, match="run `awq quantize MODEL OUT` first"):
        AutoHfQuantizer.from_config(AwqConfig(), pre_quantized=False)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("_dequantize", ["self", "model", "dtype"]),
        ("update_dtype", ["self", "dtype"]),
        ("_process_model_after_weight_loading", ["self", "model", "kwargs"]),
    ],
)
def test_the_signatures_of_the_hooks(name, wanted):
    """Ours may name them otherwise: transformers passes them by place."""
    found = parameters(getattr(_compat.HfQuantizer, name))
    assert [part for part in found if part != "kwargs"] == [part for part in wanted if part != "kwargs"]


def converter() -> _compat.WeightConverter:
    return _compat.WeightConverter(
        ["experts.*.w1.weight", "experts.*.w3.weight"],
        "experts.gate_up_proj",
        operations=[transformers.core_model_loading.MergeModulelist(0), _compat.Concatenate(dim=1)],
    )


def test_update_weight_conversions_takes_the_conversions_and_perhaps_the_model():
    found = parameters(_compat.HfQuantizer.update_weight_conversions)
    assert found in (["self", "weight_conversions"], ["self", "weight_conversions", "model"])


def test_a_weight_converter_shows_its_patterns_and_another_like_it_can_be_made():
    found = converter()
    assert found._original_source_patterns == ["experts.*.w1.weight", "experts.*.w3.weight"]
    assert found._original_target_patterns == ["experts.gate_up_proj"]
    assert found.target_patterns == ["experts.gate_up_proj"]
    assert [type(operation).__name__ for operation in found.operations] == ["MergeModulelist", "Concatenate"]
    twin = _compat.converter_like(found, ["a.*.w1.qweight"], "experts.gate_up_proj_qweight", found.operations[:1])
    assert type(twin) is _compat.WeightConverter
    assert twin._original_target_patterns == ["experts.gate_up_proj_qweight"]
    assert twin.scope_prefix == found.scope_prefix


def test_rename_source_key_gives_the_name_and_the_pattern_that_joined():
    renaming = _compat.WeightRenaming("block_sparse_moe", "mlp")
    key = "layers.0.block_sparse_moe.experts.3.w1.weight"
    name, pattern = _compat.rename_source_key(key, [renaming], [converter()], "model", {})
    assert name == "layers.0.mlp.experts.gate_up_proj"
    assert pattern is not None
    assert _compat.rename_source_key("layers.0.q.weight", [renaming], [converter()], "model", {}) == (
        "layers.0.q.weight",
        None,
    )


def test_rename_source_key_adds_the_base_prefix_where_the_model_has_it():
    state = {"model.norm.weight": torch.empty(0)}
    assert _compat.rename_source_key("norm.weight", [], [], "model", state)[0] == "model.norm.weight"


def test_the_conversion_mapping_of_a_model_with_experts():
    config = transformers.MixtralConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = [t for t in _compat.get_model_conversion_mapping(model) if isinstance(t, _compat.WeightConverter)]
    targets = {t._original_target_patterns[0].rpartition(".")[2] for t in found}
    assert {"gate_up_proj", "down_proj"} <= targets
    assert all(source.endswith(".weight") for t in found for source in t._original_source_patterns)


def test_tied_weights_are_known_before_loading():
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert "lm_head.weight" in model.all_tied_weights_keys


def test_the_config_knows_the_folder_that_it_came_from(checkpoint):
    assert transformers.AutoConfig.from_pretrained(checkpoint()).name_or_path == str(checkpoint())


def test_no_warning_where_nothing_is_passed(checkpoint, load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(checkpoint(), dtype=torch.float32)


def test_what_fusing_relies_on():
    """``get_decoder`` finds the language model; ``generate`` takes arguments in this order, and makes 20 tokens."""
    from awq_core.hf.fusing import DEFAULT_NEW_TOKENS

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=64, **sizes)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text)
        )
    assert model.get_decoder() is model.model.language_model
    model = transformers.LlamaForCausalLM(text)
    assert model.get_decoder() is model.model.get_decoder() is model.model
    assert list(inspect.signature(model.generate).parameters)[:2] == ["inputs", "generation_config"]
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.warns(UserWarning, match="default `max_length`"):
        assert model.generate(ids, eos_token_id=None).shape == (1, 3 + DEFAULT_NEW_TOKENS)
