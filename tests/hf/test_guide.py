"""The code blocks of the transformers guide, run as they are written: only models and devices are replaced."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from awq_core import PluginError
from awq_core.linear import AwqLinear
from awq_core.packed import PackedModule

BLOCKS = re.findall(r"```py(?:thon)?\n(.*?)```", Path(__file__).with_name("guide.md").read_text("utf-8"), re.DOTALL)
PLAIN, FLOAT32, FLASH, FUSED, MAPPED, EXLLAMA = BLOCKS
PASSED = "ignore:You passed `quantization_config`:UserWarning"
UNFUSED = (
    "AwqConfig asks for fused modules, but no fuser is installed: "
    "the model runs unfused, slower and with the same answers"
)


@pytest.fixture
def run(checkpoint):
    """Run a block with a tiny checkpoint for the hub's and the CPU for the GPU; ``edits`` replace more, each once."""

    def execute(block: str, folder: Path | None = None, **edits: str) -> dict:
        code, found = re.subn(r'"TheBloke/[\w.-]+"', repr(str(folder or checkpoint("mistral"))), block)
        assert found
        code = code.replace('"cuda:0"', '"cpu"').replace('"cuda"', '"cpu"').replace(".to(0)", '.to("cpu")')
        for old, new in edits.items():
            assert code.count(old) == 1
            code = code.replace(old, new)
        names: dict = {"torch": torch}  # the guide's second block does not import it
        exec(compile(code, "guide.md", "exec"), names)
        return names

    return execute


def linears(names: dict) -> list[AwqLinear]:
    return [module for module in names["model"].modules() if isinstance(module, AwqLinear)]


def test_all_blocks_are_here():
    assert len(BLOCKS) == 6


def test_plain_load(run):
    found = linears(run(PLAIN))
    assert len(found) == 14
    assert all(module.plans for module in found)


def test_other_weights_in_float32(run, told):
    names = run(FLOAT32)
    assert names["model"].dtype == torch.float32
    assert {module.scales.dtype for module in linears(names) if module.scales is not None} <= {torch.float16}
    assert told() == []


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementation(run, implementation):
    names = run(FLASH, flash_attention_2=implementation)
    assert names["model"].config._attn_implementation == implementation


def test_flash_attention_is_transformers_to_refuse(run):
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        run(FLASH)


@pytest.mark.filterwarnings(PASSED)
@pytest.mark.parametrize("block", [FUSED, MAPPED], ids=["do_fuse", "modules_to_fuse"])
def test_fused_modules_are_not_dropped_without_a_word(run, told, block, ids):
    names = run(block)
    config = names["model"].config.quantization_config
    assert (config.options.do_fuse, config.options.fuse_max_seq_len) == (True, 512)
    assert told().count(UNFUSED) == 1
    assert names["model"](ids).logits.isfinite().all()
    run(block)
    assert told().count(UNFUSED) == 1


@pytest.mark.filterwarnings(PASSED)
def test_exllama_names_what_is_installed(run):
    with pytest.raises(PluginError, match=r"backend 'exllama' is not installed; installed are .*reference"):
        run(EXLLAMA)


@pytest.fixture
def with_tokenizer(checkpoint, tmp_path):
    """A checkpoint with a tokenizer of its vocabulary's size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "How", "to", "make", "a", "cake", *map(str, range(122))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = shutil.copytree(checkpoint("mistral"), tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings(PASSED)
@pytest.mark.parametrize("version", ["reference", "cpu"])
def test_a_version_that_is_installed_answers(run, with_tokenizer, version, capsys):
    from awq_core import plugins

    if version not in plugins.registry().backends:
        pytest.skip(f"backend {version} is not installed")
    names = run(
        EXLLAMA,
        with_tokenizer,
        exllama=version,
        pad_token_id="max_new_tokens=4, pad_token_id",
        **{", max_length=50": ""},
    )
    assert names["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert names["output"].shape == (1, 9)
    assert "How to make a cake" in capsys.readouterr().out
    modules = [module for module in names["model"].modules() if isinstance(module, PackedModule)]
    chosen = {plan.decision.chosen.backend for module in modules for plan in module.plans.values()}
    assert chosen == {version}
