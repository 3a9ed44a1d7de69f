"""Which modules are fused: built-in mappings, ``modules_to_fuse``, plugins; and what a wrong mapping is told."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import awq_core
from awq_core import ConfigError, plugins
from awq_core.api import FusingMapping
from awq_core.linear import AwqLinear
from awq_fusers import fuse
from awq_fusers.apply import known_mappings, look
from awq_fusers.mapping import MAPPINGS

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

ASKED = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "layernorm": ["input_layernorm", "post_attention_layernorm", "norm"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "use_alibi": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}


@pytest.fixture
def asked(folder_of, load_model):
    """``asked("llama", mlp=[])``: a model loaded with ``modules_to_fuse``, ASKED with changes."""

    def run(name="llama", **changes):
        config = awq_core.AwqConfig(bits=4, fuse_max_seq_len=96, modules_to_fuse=ASKED | changes)
        return load_model(folder_of(name), quantization_config=config)

    return run


def sizes(model):
    return [(layer.qkv_sizes, layer.gate_up_sizes) for layer in model.awq_fused.layers]


def test_names_in_order(asked, told, pair, prompt, tokens):
    model = asked()
    assert sizes(model) == [((64, 32, 32), (128, 128))] * 2
    assert tokens(model, prompt(2)) == tokens(pair("llama")[0], prompt(2))
    assert told() == []


def test_the_record(asked):
    record = asked().awq_fused
    layer = record.layers[1]
    assert (record.model_type, record.max_seq_len, record.unfused, record.joined) == ("llama", 96, (), 10)
    assert record.summary() == "fused 2 attention and 2 MLP blocks of 2 layers"
    assert layer.name == "model.layers.1"
    assert layer.attention is layer.layer.self_attn
    assert layer.mlp is layer.layer.mlp
    assert (layer.qkv_names, layer.gate_up_names) == (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    assert isinstance(layer.qkv, AwqLinear)
    assert layer.o is layer.layer.self_attn.o_proj
    assert layer.down is layer.layer.mlp.down_proj


def test_an_empty_list_leaves_out(asked):
    assert sizes(asked(mlp=[])) == [((64, 32, 32), ())] * 2
    assert sizes(asked(attention=[])) == [((), (128, 128))] * 2
    model = asked(attention=[], mlp=[], layernorm=[])
    assert sizes(model) == [((), ())] * 2


def test_paths_are_names_too(asked):
    inside = [f"self_attn.{name}" for name in ASKED["attention"]]
    assert sizes(asked(attention=inside)) == [((64, 32, 32), (128, 128))] * 2


def test_packed_projections(asked, pair, prompt, tokens):
    model = asked("phi3", attention=["qkv_proj", "o_proj"], mlp=["gate_up_proj", "down_proj"])
    assert sizes(model) == [((128,), (256,))] * 2
    assert model.awq_fused.layers[0].qkv is model.model.layers[0].self_attn.qkv_proj
    assert tokens(model, prompt(2)) == tokens(pair("phi3")[0], prompt(2))


def test_alibi_is_checked_not_used(asked, pair, prompt, tokens):
    changes = {"attention": ["query_key_value", "dense"], "mlp": [], "num_key_value_heads": 1, "layernorm": []}
    model = asked("falcon_alibi", **changes, use_alibi=True)
    assert tokens(model, prompt(2)) == tokens(pair("falcon_alibi")[0], prompt(2))
    with pytest.raises(ConfigError, match="modules_to_fuse says use_alibi False, but FalconModel has ALiBi"):
        asked("falcon_alibi", **changes)


WRONG = {
    "modules_to_fuse['attention'] names 'query', which model.layers.0.self_attn does not have; it has q_proj, k_proj": {
        "attention": ["query", "k_proj", "v_proj", "o_proj"]
    },
    "modules_to_fuse['mlp'] names 'w1', which model.layers.0.mlp does not have; it has gate_proj, up_proj, down_proj": {
        "mlp": ["w1", "up_proj", "down_proj"]
    },
    "modules_to_fuse['mlp'] names w1, w3, w2, but no module of model.layers.0 has any of them; its linears are": {
        "mlp": ["w1", "w3", "w2"]
    },
    "modules_to_fuse['attention'] names qkv, out, but no module": {"attention": ["qkv", "out"]},
    "modules_to_fuse says hidden_size 128, but LlamaModel has 64": {"hidden_size": 128},
    "modules_to_fuse says num_attention_heads 8, but LlamaModel has 4": {"num_attention_heads": 8},
    "modules_to_fuse says num_key_value_heads 4, but LlamaModel has 2": {"num_key_value_heads": 4},
    "modules_to_fuse says use_alibi True, but LlamaModel has rotary position embeddings, not": {"use_alibi": True},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_mapping_names_what_is_wrong(asked, said, monkeypatch):
    monkeypatch.setattr("awq_core.hf.quantizer._check_loaded", None)  # before the weights are read
    with pytest.raises(ConfigError, match=re.escape(said)):
        asked(**WRONG[said])


def test_head_counts_against_shapes(pair, monkeypatch):
    """Where the config says nothing, the projections do."""
    plain = pair("llama")[0]
    monkeypatch.setattr(plain.model, "config", SimpleNamespace(model_type="llama"))
    for changes, said in [
        ({"hidden_size": 32}, "says hidden_size 32, but model.layers.0.self_attn.q_proj takes 64 inputs"),
        ({"num_attention_heads": 6}, "but the 64 outputs of model.layers.0.self_attn.q_proj are no multiple of 6"),
        ({"num_key_value_heads": 1}, "in the projections of model.layers.0 would be 16 and 32 wide"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            look(plain, ASKED | changes)


def test_norms_that_do_not_exist_are_told(asked, told):
    model = asked(layernorm=["ln1", "ln2", "norm"])
    assert sizes(model) == [((64, 32, 32), (128, 128))] * 2
    assert told() == [
        "modules_to_fuse['layernorm'] names ln1, ln2, which LlamaModel does not have (its norms are norm, "
        "input_layernorm, post_attention_layernorm): the model's own norms are used, whatever they are called"
    ]


def test_a_mapping_that_is_no_mapping(pair):
    with pytest.raises(ConfigError, match=r"^modules_to_fuse: Required fields are missing .*'hidden_size'"):
        fuse(pair("llama")[0], {"mlp": []})


def test_names_that_fit_twice(pair):
    model = pair("llama")[0]
    layer = model.model.layers[0]
    layer.cross = nn.Module()
    for name in ASKED["attention"]:
        setattr(layer.cross, name, nn.Identity())
    try:
        with pytest.raises(ConfigError, match=r"more than one place, .*cross and .*self_attn: write the path inside"):
            look(model, ASKED)
        inside = [f"self_attn.{name}" for name in ASKED["attention"]]
        _, plans, unfused, _ = look(model, ASKED | {"attention": inside})
        assert unfused == []
        assert all(plan.attention is not None for plan in plans)
    finally:
        del layer.cross


def test_a_block_that_does_not_fit(folder_of, load_model, told):
    """Named by the user it is an error, else it stays as it is and the user is told."""
    path = "model.layers.0.self_attn"
    folder = folder_of("llama", modules_to_not_convert=["layers.0.self_attn.k_proj", "layers.0.mlp.gate_proj"])
    config = awq_core.AwqConfig(bits=4, do_fuse=True, fuse_max_seq_len=96)
    model = load_model(folder, quantization_config=config)
    assert sizes(model) == [((), ()), ((64, 32, 32), (128, 128))]
    assert [(block.path, block.reason) for block in model.awq_fused.unfused] == [
        (path, "k_proj is not quantized"),
        ("model.layers.0.mlp", "gate_proj is not quantized"),
    ]
    assert told() == [
        f"{path} stays unfused: k_proj is not quantized",
        "model.layers.0.mlp stays unfused: gate_proj is not quantized",
    ]
    assert model.awq_fused.summary().endswith("; 2 blocks stayed unfused")
    with pytest.raises(ConfigError, match=f"modules_to_fuse: {path} cannot be fused: k_proj is not quantized"):
        fuse(load_model(folder), ASKED)


def test_each_model_type_once():
    types = [name for mapping in MAPPINGS for name in mapping.model_types]
    assert len(set(types)) == len(types)
    known = set(transformers.models.auto.configuration_auto.CONFIG_MAPPING)
    known |= {"internlm3"}  # not in every version that we run on
    assert [name for name in types if name not in known] == []


def test_an_unknown_architecture(pair, monkeypatch, told):
    plain = pair("llama")[0]
    monkeypatch.setattr(plain.model.config, "model_type", "nobody-knows", raising=False)
    model_type, plans, unfused, _ = look(plain)  # the usual names are there
    assert (model_type, unfused) == ("nobody-knows", [])
    assert all(plan.attention is not None and plan.mlp is not None for plan in plans)
    falcon = pair("falcon")[0]
    monkeypatch.setattr(falcon.transformer.config, "model_type", "nobody-knows", raising=False)
    with pytest.raises(
        ConfigError, match=r"no fusing mapping for model type 'nobody-knows': pass modules_to_fuse, .*mpt"
    ):
        look(falcon)


def test_a_plugins_mapping_is_used(pair, monkeypatch):
    mine = FusingMapping(("acme",), mlp=())
    found = replace(plugins.registry(), fusers=(mine,))
    monkeypatch.setattr(plugins, "registry", lambda: found)
    plain = pair("llama")[0]
    monkeypatch.setattr(plain.model.config, "model_type", "acme", raising=False)
    assert known_mappings()["acme"] is mine
    _, plans, _, _ = look(plain)
    assert all(plan.attention is not None and plan.mlp is None for plan in plans)
    wrong = replace(mine, layers="blocks")
    with pytest.raises(
        ConfigError, match="LlamaModel has no list of layers 'blocks', which the fusing mapping of acme"
    ):
        look(plain, wrong)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_types": ()},
        {"model_types": "llama"},
        {"attention": ("a", "b", "c")},
        {"mlp": ("a",)},
        {"attention": ["a", "b"]},
        {"layers": None},
    ],
    ids=str,
)
def test_a_mapping_checks_itself(fields):
    with pytest.raises(ValueError, match=f"FusingMapping.{next(iter(fields))} must be"):
        FusingMapping(**{"model_types": ("acme",)} | fields)


def test_only_the_language_model_is_fused(tmp_path):
    """A tower has attention of the same names, even quantized: it is not looked at."""
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=32),
        image_token_id=63,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for tower in (model.model.vision_tower, model.model.language_model):
        for path, module in list(tower.named_modules()):
            if isinstance(module, nn.Linear):
                new = AwqLinear(module.in_features, module.out_features, 32, bias=module.bias is not None)
                for name, tensor in new.named_parameters():
                    tensor.data.zero_() if name in ("bias", "scales") else tensor.data.random_()
                tower.set_submodule(path, new)
    record = fuse(model)
    assert [layer.name for layer in record.layers] == ["model.language_model.layers.0"]
    assert (record.model_type, sizes(model)) == ("llama", [((64, 64, 64), (128, 128))])
    assert not [name for name, _ in model.model.vision_tower.named_modules() if "joined" in name]
    ids = torch.tensor([[1, 63, 63, 63, 63, 2]])
    model.unfuse()
    assert model(input_ids=ids, pixel_values=torch.zeros(1, 3, 8, 8)).logits.isfinite().all()
