"""enable() and disable(), and the config class under its three names."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import transformers
from transformers.utils.quantization_config import AwqConfig as EarlyConfig

import awq_core
from awq_core.hf import _compat
from awq_core.hf.config import METHODS
from awq_core.hf.quantizer import AwqCoreQuantizer

MAP = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "layernorm": ["norm"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "use_alibi": False,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
}


def touched() -> dict[str, object]:
    """Every object of transformers that enable() may replace; where a class inherits a method, it has none."""
    found: dict[str, object] = {"quantizer": _compat.QUANTIZERS["awq"], "config": _compat.CONFIGS["awq"]}
    found |= {f"AwqConfig.{name}": value for name, value in vars(_compat.AwqConfig).items()}
    return found | {f"modeling_utils.{name}": value for name, value in vars(_compat.modeling_utils).items()}


def test_enable_and_disable_restore_every_object():
    awq_core.disable()
    before = touched()
    awq_core.enable()
    during = touched()
    changed = {name for name in during if during[name] is not before.get(name)}
    assert changed == {
        "quantizer",
        "config",
        "modeling_utils._get_dtype",
        "modeling_utils.get_hf_quantizer",
        *(f"AwqConfig.{name}" for name in METHODS),
    }
    awq_core.disable()
    after = touched()
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_enable_twice_is_enable_once():
    awq_core.enable()
    once = touched()
    awq_core.enable()
    assert all(value is once[name] for name, value in touched().items())
    awq_core.disable()
    assert _compat.QUANTIZERS["awq"] is not AwqCoreQuantizer
    awq_core.disable()  # and again, which does nothing
    assert _compat.QUANTIZERS["awq"] is not AwqCoreQuantizer


def test_without_awq_core_transformers_says_what_it_always_said(checkpoint, load):
    awq_core.disable()
    with pytest.raises(ImportError, match="requires gptqmodel"):
        load(checkpoint())
    assert not hasattr(EarlyConfig(do_fuse=True), "do_fuse")


@pytest.mark.parametrize("config", [EarlyConfig, awq_core.AwqConfig, "late"], ids=["early", "ours", "late"])
def test_options_are_kept_by_whichever_class(config):
    made = (transformers.AwqConfig if config == "late" else config)(bits=4, do_fuse=True, fuse_max_seq_len=512)
    assert made.do_fuse is True
    assert made.fuse_max_seq_len == 512
    assert made.options.explicit == {"bits", "do_fuse", "fuse_max_seq_len"}
    assert made.get_loading_attributes() == {"options": made.options}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 3}, "bits is 3, but awq-core runs 4-bit AWQ weights only"),
        ({"do_fuse": True}, "You cannot enable fused modules without specifying a `fuse_max_seq_len`"),
        ({"fuse_max_seq": 512}, "did you mean 'fuse_max_seq_len'"),
        ({"group_size": 100}, "group_size is 100"),
        ({"exllama_config": {"version": 3}}, "Only supported versions are in"),
        ({"modules_to_fuse": {"attention": []}, "fuse_max_seq_len": 8}, "Required fields are missing"),
    ],
)
@pytest.mark.parametrize("config", [EarlyConfig, awq_core.AwqConfig], ids=["transformers", "ours"])
def test_refusals_are_value_errors_of_one_sentence(config, options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        config(**options)
    assert isinstance(error.value, awq_core.ConfigError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [EarlyConfig, awq_core.AwqConfig], ids=["transformers", "ours"])
def test_copies_of_a_config(config):
    made = config(version="cpu", modules_to_fuse=MAP, fuse_max_seq_len=512)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert type(twin) is type(made)
        assert twin.options == made.options
        assert twin.version == "cpu"
        assert twin.do_fuse is True
        assert twin == made


def test_json_of_a_config():
    text = awq_core.AwqConfig(group_size=64).to_json_string()
    wanted = {"bits": 4, "group_size": 64, "zero_point": True, "modules_to_not_convert": None, "quant_method": "awq"}
    assert json.loads(text) == wanted


def test_a_checkpoints_config_keeps_its_own_keys():
    raw = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "meta": {"by": "someone"}}
    config = _compat.CONFIGS["awq"].from_dict(raw)
    assert config.to_dict() == raw
    assert (config.bits, config.group_size, config.version) == (4, 64, "gemm")
    assert pickle.loads(pickle.dumps(config)).to_dict() == raw
    assert copy.deepcopy(config).to_dict() == raw


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_auto_enables_and_the_class_imported_before_keeps_options():
    code = """
import sys, awq_core
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AwqConfig
assert not hasattr(AwqConfig(do_fuse=True), "do_fuse")
import awq_core.auto
from transformers import AwqConfig as Later
import transformers, awq_core.hf.config
import transformers.models.llama.modeling_llama
for config in (AwqConfig, Later, transformers.AwqConfig, awq_core.AwqConfig):
    assert config(do_fuse=True, fuse_max_seq_len=8).do_fuse
awq_core.disable()
assert not hasattr(AwqConfig(do_fuse=True), "do_fuse")
print("ok")
"""
    assert run(code).strip() == "ok"
