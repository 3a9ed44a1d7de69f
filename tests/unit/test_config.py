"""The config: every rule, aliases, round trips, and refusals that are one sentence each."""

import copy
import pickle
import subprocess
import sys
from enum import IntEnum, StrEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_core.config import CheckpointConfig, canonical_version
from awq_core.errors import ConfigError
from awq_core.options import UserOptions

WHERE = "model/config.json"
YI_34B = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "layernorm": ["ln1", "ln2", "norm"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "use_alibi": False,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "hidden_size": 7168,
}


def read(**raw):
    return CheckpointConfig.from_dict(raw, WHERE)


def fuse(**changes):
    return UserOptions(fuse_max_seq_len=512, modules_to_fuse={**YI_34B, **changes})


def refusal(call, *args, **kwargs):
    """The text of a refusal, after checking that it is one plain sentence with a place in front."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value)
    where, _, sentence = text.partition(": ")
    assert where in (WHERE, "AwqConfig", "quantization_config")
    assert "\n" not in text
    assert sentence.endswith((".", "?"))
    assert ". " not in sentence
    assert "pydantic" not in text
    return text


# What a checkpoint says


def test_usual_checkpoint():
    config = read(quant_method="awq", zero_point=True, group_size=128, bits=4, version="gemm")
    assert (config.bits, config.group_size, config.zero_point, config.version) == (4, 128, True, "gemm")
    assert config.notes == ()


def test_empty_checkpoint_config_makes_no_claim():
    config = read()
    assert (config.bits, config.group_size, config.zero_point, config.version) == (4, 128, True, None)
    assert (config.backend, config.modules_to_not_convert, config.lm_head) == (None, None, False)
    assert config.to_dict() == {"quant_method": "awq"}


def test_legacy_names():
    raw = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    config = CheckpointConfig.from_dict(raw, WHERE)
    assert (config.bits, config.group_size, config.version) == (4, 64, "gemm")
    assert config.model_extra == {}
    assert config.to_dict() == {**raw, "quant_method": "awq"}


def test_equal_aliases_are_fine_and_conflicting_ones_are_not():
    assert read(group_size=64, q_group_size=64).group_size == 64
    assert "bits is 4 but w_bit, an older name for it, is 3" in refusal(read, bits=4, w_bit=3)
    assert "group_size is 128 but q_group_size" in refusal(read, group_size=128, q_group_size=64)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("GEMM", "gemm"),
        ("Gemv", "gemv"),
        ("GEMV-FAST", "gemv_fast"),
        ("gemv_fast", "gemv_fast"),
        ("LLM_AWQ", "llm-awq"),
        ("llm-awq", "llm-awq"),
        ("exllama", "exllama"),
        ("IPEX", "ipex"),
        ("marlin", "marlin"),
    ],
)
def test_version_names(written, name):
    config = read(version=written)
    assert config.version == name == canonical_version(written)
    assert config.notes == ()
    assert config.to_dict()["version"] == written


def test_unknown_version_is_kept_and_noted():
    config = read(version="Acme_Fast")
    assert config.version == "Acme_Fast"
    assert config.notes == (
        f"{WHERE}: version 'Acme_Fast' is not one that awq-core knows, "
        "so the layout is taken from the weights' header alone.",
    )


@pytest.mark.parametrize("key", ["zero_point", "version", "backend", "modules_to_not_convert", "lm_head"])
def test_null_means_not_said(key):
    assert getattr(read(**{key: None}), key) == getattr(read(), key)
    assert read(**{key: None}).to_dict() == {key: None, "quant_method": "awq"}


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 0, -4])
def test_bits_other_than_four(bits):
    for call in (read, UserOptions):
        text = refusal(call, bits=bits)
        assert f"bits is {bits}" in text
        assert "GPTQ" in text
    assert f"{WHERE}: bits is {bits}" in refusal(read, w_bit=bits)


@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 64, 128, 256, 1024])
def test_group_sizes(group_size):
    assert read(group_size=group_size).group_size == group_size
    assert UserOptions(group_size=group_size).group_size == group_size


@pytest.mark.parametrize("group_size", [-2, -16, 0, 1, 8, 100])
def test_group_sizes_refused(group_size):
    for call in (read, UserOptions):
        assert f"group_size is {group_size}, but it must be -1" in refusal(call, group_size=group_size)


@pytest.mark.parametrize("version", ["gemv", "GEMV_FAST", "llm-awq"])
def test_versions_that_need_zero_points(version):
    assert read(version=version).zero_point is True
    for call in (read, UserOptions):
        text = refusal(call, version=version, zero_point=False)
        assert f"version {canonical_version(version)} always stores zero points" in text


def test_marlin_has_no_zero_points():
    assert read(version="Marlin").zero_point is False
    assert read(version="marlin", zero_point=None).zero_point is False
    assert read(version="marlin", zero_point=False).zero_point is False
    for call in (read, UserOptions):
        assert "marlin stores no zero points" in refusal(call, version="marlin", zero_point=True)


@pytest.mark.parametrize("version", ["gemm", "exllama", "ipex", None])
@pytest.mark.parametrize("zero_point", [True, False])
def test_other_versions_take_both(version, zero_point):
    assert read(version=version, zero_point=zero_point).zero_point is zero_point


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bits", "4", "bits must be a whole number, not '4'."),
        ("bits", True, "bits must be a whole number, not True."),
        ("bits", None, "bits must be a whole number, not None."),
        ("group_size", 128.5, "group_size must be a whole number, not 128.5."),
        ("zero_point", "yes", "zero_point must be True or False, not 'yes'."),
        ("version", 4, "version must be a string, not 4."),
        ("backend", ["a"], "backend must be a string, not ['a']."),
        ("modules_to_not_convert", "lm_head", "modules_to_not_convert must be a list, not 'lm_head'."),
        ("modules_to_not_convert", ["a", 3], "modules_to_not_convert.1 must be a string, not 3."),
        ("modules_to_not_convert", [""], "modules_to_not_convert.0 must be a name that is not empty, not ''."),
    ],
)
def test_wrong_types(key, value, words):
    assert refusal(read, **{key: value}) == f"{WHERE}: {words}"
    assert refusal(UserOptions, **{key: value}) == f"AwqConfig: {words}"


def test_lm_head_and_modules_to_not_convert():
    config = read(lm_head=True, modules_to_not_convert=["visual"])
    assert config.lm_head is True
    assert config.modules_to_not_convert == ["visual"]
    assert "lm_head must be True or False" in refusal(read, lm_head="yes")


def test_quant_method():
    assert read(quant_method="AWQ").quant_method == "awq"
    assert read(quant_method="awq_core").to_dict() == {"quant_method": "awq"}
    assert "quant_method is 'gptq'" in refusal(read, quant_method="gptq")


@pytest.mark.parametrize("raw", [None, [], "awq", {1: 2}])
def test_not_a_mapping(raw):
    assert "must be a mapping of names" in refusal(CheckpointConfig.from_dict, raw, WHERE)


def test_direct_use_refuses_in_the_same_way():
    assert refusal(CheckpointConfig, bits=3).startswith("quantization_config: bits is 3")


def test_file_of_transformers_5_comes_back_unchanged():
    raw = {
        "act_group_aware": True,
        "backend": "auto",
        "bits": 4,
        "dataset": None,
        "desc_act": False,
        "format": "gemm",
        "group_size": 128,
        "meta": {"quantizer": ["acme:1.0"]},
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "sym": True,
        "version": "gemm",
        "zero_point": True,
    }
    config = CheckpointConfig.from_dict(raw, WHERE)
    assert list(config.to_dict().items()) == list(raw.items())
    assert config.model_extra["desc_act"] is False


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
own_keys = [*CheckpointConfig.model_fields, "w_bit", "q_group_size"]
odd_keys = st.sampled_from(["self", "where", "cls", "to_dict", "model_config", "notes", "_raw", "__class__", ""])


@given(st.dictionaries(st.text(max_size=8) | odd_keys, json_values, max_size=5), st.sampled_from(["bits", "w_bit"]))
def test_unknown_keys_survive_a_round_trip(unknown, bits):
    raw = {**{key: value for key, value in unknown.items() if key not in own_keys}, bits: 4}
    before = copy.deepcopy(raw)
    config = CheckpointConfig.from_dict(raw, WHERE)
    assert config.to_dict() == {**before, "quant_method": "awq"}
    assert CheckpointConfig.from_dict(config.to_dict(), WHERE).to_dict() == config.to_dict()
    assert raw == before


def test_kept_values_are_our_own_copy():
    raw = {"meta": {"a": [1]}}
    config = CheckpointConfig.from_dict(raw, WHERE)
    raw["meta"]["a"].append(2)
    config.to_dict()["meta"]["a"].append(3)
    assert config.to_dict()["meta"] == {"a": [1]}


# What a user asks for


def test_defaults():
    options = UserOptions()
    assert (options.bits, options.group_size, options.zero_point, options.version) == (4, 128, True, None)
    assert (options.do_fuse, options.fuse_max_seq_len, options.modules_to_fuse) == (False, None, None)
    assert (options.backend, options.modules_to_not_convert, options.exllama_config) == (None, None, None)
    assert (options.request, options.notes, options.explicit) == (None, (), frozenset())


def test_guide_supported_architectures():
    options = UserOptions(bits=4, fuse_max_seq_len=512, do_fuse=True)
    assert options.do_fuse is True
    assert options.fuse_max_seq_len == 512
    assert options.explicit == {"bits", "fuse_max_seq_len", "do_fuse"}


def test_guide_yi_34b():
    options = UserOptions(bits=4, fuse_max_seq_len=512, modules_to_fuse=YI_34B)
    assert options.do_fuse is True
    assert options.modules_to_fuse.attention == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert options.modules_to_fuse.model_dump(exclude_none=True) == YI_34B
    assert options.explicit == {"bits", "fuse_max_seq_len", "modules_to_fuse"}


def test_guide_exllama():
    options = UserOptions(version="exllama")
    assert options.request == "exllama"
    assert options.exllama_config.model_dump() == {"version": 2, "max_input_len": 2048, "max_batch_size": 8}
    assert options.explicit == {"version"}
    assert options.notes == ()


def test_explicit_counts_named_defaults_but_not_none():
    assert UserOptions(group_size=128, version=None, do_fuse=None).explicit == {"group_size"}


@pytest.mark.parametrize(
    ("written", "request_", "noted"),
    [
        ("GEMM", "gemm", False),
        ("gemv", "gemv", False),
        ("rocm", "rocm", False),
        ("Acme_Fast", "acme_fast", False),
        ("ipex", "cpu", True),
        ("IPEX", "cpu", True),
        ("gemv_fast", "gemv", True),
        ("gemv-fast", "gemv", True),
        ("llm-awq", "gemv", True),
        ("LLM_AWQ", "gemv", True),
    ],
)
def test_request(written, request_, noted):
    options = UserOptions(version=written)
    assert options.request == request_
    expected = f"AwqConfig: version {written!r} is taken as a request for the {request_!r} backend."
    assert options.notes == ((expected,) if noted else ())


@pytest.mark.parametrize("version", ["", "  "])
def test_empty_version(version):
    assert "version is empty" in refusal(UserOptions, version=version)


def test_enum_members_are_plain_values():
    class Old(StrEnum):
        VERSION = "gemv"
        BACKEND = "autoawq"

    class Exllama(IntEnum):
        TWO = 2

    options = UserOptions(version=Old.VERSION, backend=Old.BACKEND, exllama_config={"version": Exllama.TWO})
    assert (options.request, options.backend) == ("gemv", "autoawq")
    assert type(options.version) is str
    assert type(options.exllama_config.version) is int


@pytest.mark.parametrize("backend", ["autoawq", "AUTOAWQ", "auto"])
def test_backends_without_a_note(backend):
    assert UserOptions(backend=backend).backend == backend.lower()
    assert UserOptions(backend=backend).notes == ()


def test_backend_llm_awq_is_noted():
    assert "backend 'llm-awq' has no effect" in UserOptions(backend="llm-awq").notes[0]


def test_rule_1_backend():
    text = refusal(UserOptions, backend="marlin")
    assert "Only supported quantization backends in autoawq and llm-awq - not recognized backend 'marlin'" in text


def test_rule_6_fuse_max_seq_len_is_asked_for():
    words = (
        "You cannot enable fused modules without specifying a `fuse_max_seq_len`, "
        "make sure to pass a valid `fuse_max_seq_len` for your usecase."
    )
    assert words in refusal(UserOptions, do_fuse=True)
    assert words in refusal(UserOptions, modules_to_fuse=YI_34B)
    assert UserOptions(do_fuse=False, modules_to_fuse=YI_34B).do_fuse is False


@pytest.mark.parametrize("length", [0, -1])
def test_fuse_max_seq_len_is_positive(length):
    text = refusal(UserOptions, do_fuse=True, fuse_max_seq_len=length)
    assert text == f"AwqConfig: fuse_max_seq_len must be greater than 0, not {length}."


def test_fuse_max_seq_len_without_fusing_warns():
    with pytest.warns(UserWarning, match="fuse_max_seq_len has no effect without do_fuse=True") as caught:
        assert UserOptions(fuse_max_seq_len=512).fuse_max_seq_len == 512
    assert caught[0].filename == __file__


@pytest.mark.parametrize("key", sorted(YI_34B))
def test_rule_9_lists_only_what_is_missing(key):
    mapping = {name: value for name, value in YI_34B.items() if name != key}
    text = refusal(UserOptions, fuse_max_seq_len=512, modules_to_fuse=mapping)
    assert text == (f"AwqConfig: Required fields are missing in the fusing mapping, the missing fields are [{key!r}].")


def test_empty_fusing_map_means_none_unless_fusing_was_asked_for():
    assert UserOptions(modules_to_fuse={}).do_fuse is False
    assert UserOptions(modules_to_fuse={}).modules_to_fuse is None
    text = refusal(UserOptions, do_fuse=True, fuse_max_seq_len=512, modules_to_fuse={})
    assert all(name in text for name in YI_34B)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": []},
        {"attention": ["qkv_proj", "o_proj"]},
        {"mlp": []},
        {"mlp": ["gate_up_proj", "down_proj"]},
        {"layernorm": []},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 56},
        {"hidden_size": 7100},
        {"rope_theta": 5000000.0},
        {"max_seq_len": 4096},
    ],
)
def test_fusing_maps_that_are_fine(changes):
    assert fuse(**changes).modules_to_fuse.model_dump(exclude_none=True) == {**YI_34B, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": ["q", "k", "v"]}, "modules_to_fuse['attention'] has 3 name(s)"),
        ({"attention": ["q"]}, "modules_to_fuse['attention'] has 1 name(s)"),
        ({"mlp": ["gate"]}, "modules_to_fuse['mlp'] has 1 name(s)"),
        ({"mlp": ["a", "b", "c", "d"]}, "modules_to_fuse['mlp'] has 4 name(s)"),
        ({"attention": "q_proj"}, "modules_to_fuse.attention must be a list, not 'q_proj'."),
        ({"mlp": [1, 2, 3]}, "modules_to_fuse.mlp.0 must be a string, not 1."),
        ({"layernorm": None}, "modules_to_fuse.layernorm must be a list, not None."),
        ({"layernorm": [""]}, "modules_to_fuse.layernorm.0 must be a name that is not empty"),
        ({"use_alibi": "no"}, "modules_to_fuse.use_alibi must be True or False, not 'no'."),
        ({"use_alibi": 0}, "modules_to_fuse.use_alibi must be True or False, not 0."),
        ({"num_attention_heads": 0}, "modules_to_fuse.num_attention_heads must be greater than 0, not 0."),
        ({"num_key_value_heads": -8}, "modules_to_fuse.num_key_value_heads must be greater than 0, not -8."),
        ({"hidden_size": "7168"}, "modules_to_fuse.hidden_size must be a whole number, not '7168'."),
        ({"num_key_value_heads": 9}, "56 num_attention_heads, which is not a multiple of its 9 num_key_value_heads."),
        ({"layernorms": []}, "there is no option 'modules_to_fuse.layernorms'; did you mean 'layernorm'?"),
        ({"rope_theta": 0}, "modules_to_fuse.rope_theta must be greater than 0, not 0."),
    ],
)
def test_fusing_maps_refused(changes, words):
    assert words in refusal(fuse, **changes)


def test_fusing_map_that_is_no_mapping():
    assert "modules_to_fuse must be a mapping, not ['q_proj']." in refusal(
        UserOptions, fuse_max_seq_len=512, modules_to_fuse=["q_proj"]
    )


@pytest.mark.parametrize("version", [1, 2])
def test_exllama_config(version):
    options = UserOptions(version="exllama", exllama_config={"version": version, "max_batch_size": 2})
    assert options.exllama_config.model_dump() == {"version": version, "max_input_len": 2048, "max_batch_size": 2}


@pytest.mark.parametrize(
    ("config", "notes"),
    [
        ({"version": 2}, []),
        ({"version": 1}, ["version 1, which the kernels of version 2 run"]),
        ({"version": 2, "max_input_len": 64}, ["reserve nothing"]),
        ({"version": 1, "max_batch_size": 1}, ["version 1", "reserve nothing"]),
    ],
)
def test_what_of_exllama_config_changes_nothing_is_noted(config, notes):
    found = UserOptions(version="exllama", exllama_config=config).notes
    assert len(found) == len(notes)
    assert all(words in note for words, note in zip(notes, found, strict=True))


def test_exllama_config_without_exllama_is_noted():
    options = UserOptions(exllama_config={"version": 1})
    assert options.notes == ("AwqConfig: exllama_config has no effect without version='exllama'.",)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_input_len": 2048}, "`exllama_config` needs to have a `version` key."),
        ({}, "`exllama_config` needs to have a `version` key."),
        ({"version": 3}, "Only supported versions are in [1, 2] - not recognized version 3."),
        ({"version": True}, "exllama_config.version must be a whole number, not True."),
        ({"version": "two"}, "exllama_config.version must be a whole number, not 'two'."),
        ({"version": 2, "max_input_len": 0}, "exllama_config.max_input_len must be greater than 0, not 0."),
        ({"version": 2, "max_batch_size": "8"}, "exllama_config.max_batch_size must be a whole number, not '8'."),
        (
            {"version": 2, "max_batchsize": 8},
            "no option 'exllama_config.max_batchsize'; did you mean 'max_batch_size'?",
        ),
        ([2], "exllama_config must be a mapping, not [2]."),
    ],
)
def test_exllama_config_refused(config, words):
    assert words in refusal(UserOptions, version="exllama", exllama_config=config)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("do_fused", "do_fuse"),
        ("fuse_max_len", "fuse_max_seq_len"),
        ("Group_Size", "group_size"),
        ("module_to_fuse", "modules_to_fuse"),
        ("w_bit", "bits"),
        ("q_group_size", "group_size"),
        ("format", "version"),
        ("sym", "zero_point"),
    ],
)
def test_did_you_mean(name, guess):
    for value in (1, None):
        text = refusal(UserOptions, **{name: value})
        assert text == f"AwqConfig: there is no option {name!r}; did you mean {guess!r}?"


@pytest.mark.parametrize("name", ["desc_act", "dataset", "tokenizer", "damp_percent", "quant_method", "_explicit"])
def test_options_that_belong_elsewhere(name):
    text = refusal(UserOptions, **{name: "x"})
    assert text.startswith(f"AwqConfig: there is no option {name!r}; ")


@given(st.text(), st.text())
def test_any_text_gives_one_line(name, value):
    if name not in UserOptions.model_fields:
        with pytest.raises(ConfigError) as caught:
            UserOptions(**{name: value})
        assert len(str(caught.value).splitlines()) == 1


def test_long_values_are_shortened():
    assert len(refusal(UserOptions, modules_to_not_convert="x" * 5000)) < 200


# Both


@pytest.mark.parametrize("config", [CheckpointConfig("f.json", w_bit=4, version="odd"), UserOptions(version="ipex")])
def test_copies_keep_everything(config):
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert other.notes == config.notes


def test_import_is_light():
    code = "import sys, awq_core.options; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
