"""The code blocks of the transformers guide, run as they are written: only models and devices are replaced."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from awq_core import ConfigError, NoKernelError
from awq_core.linear import AwqLinear
from awq_core.packed import PackedModule

BLOCKS = re.findall(r"```py(?:thon)?\n(.*?)```", Path(__file__).with_name("guide.md").read_text("utf-8"), re.DOTALL)
PLAIN, FLOAT32, FLASH, FUSED, MAPPED, EXLLAMA = BLOCKS
PASSED = "ignore:You passed `quantization_config`:UserWarning"


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


def same_answer(fused, plain) -> bool:
    ids = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return fused.generate(ids, **options).tolist() == plain.generate(ids, **options).tolist()


@pytest.mark.filterwarnings(PASSED)
def test_fused_modules(run, load, checkpoint, told):
    model = run(FUSED)["model"]
    assert model.awq_fused.summary() == "fused 2 attention and 2 MLP blocks of 2 layers"
    assert model.awq_fused.max_seq_len == 512
    assert same_answer(model, load(checkpoint("mistral")))
    with pytest.raises(ValueError, match="more than fuse_max_seq_len=512"):
        model.generate(torch.ones(1, 500, dtype=torch.long))
    assert not [note for note in told() if "fus" in note]


@pytest.fixture(scope="module")
def yi(tmp_path_factory):
    """The sizes of Yi-34B that the guide's mapping names, and everything else tiny."""
    import transformers

    from awq_core.hf.quantize import quantize

    heads = {"num_attention_heads": 56, "num_key_value_heads": 8, "head_dim": 4}
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=7168, intermediate_size=64, num_hidden_layers=1, **heads
    )
    folder = tmp_path_factory.mktemp("yi")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder / "dense")
    return quantize(folder / "dense", folder / "awq", group_size=32, method="rtn").out


@pytest.mark.filterwarnings(PASSED)
def test_fused_modules_by_their_names(run, load, yi, told):
    model = run(MAPPED, yi)["model"]
    assert model.awq_fused.summary() == "fused 1 attention and 1 MLP blocks of 1 layers"
    assert same_answer(model, load(yi))
    assert [note for note in told() if "modules_to_fuse" in note] == [
        "modules_to_fuse['layernorm'] names ln1, ln2, which LlamaModel does not have (its norms are norm, "
        "input_layernorm, post_attention_layernorm): the model's own norms are used, whatever they are called"
    ]


@pytest.mark.filterwarnings(PASSED)
def test_a_mapping_for_another_model_is_refused(run):
    with pytest.raises(ConfigError, match="modules_to_fuse says hidden_size 7168, but MistralModel has 64"):
        run(MAPPED)


@pytest.mark.filterwarnings(PASSED)
def test_exllama_on_a_cpu_says_what_it_needs(run):
    with pytest.raises(NoKernelError, match=r'version="exllama"\) asks for backend exllama.*an NVIDIA or AMD GPU'):
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
        pad_token_id="min_new_tokens=4, max_new_tokens=4, pad_token_id",
        **{", max_length=50": ""},
    )
    assert names["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert names["output"].shape == (1, 9)
    assert "How to make a cake" in capsys.readouterr().out
    modules = [module for module in names["model"].modules() if isinstance(module, PackedModule)]
    chosen = {plan.decision.chosen.backend for module in modules for plan in module.plans.values()}
    assert chosen == {version}
