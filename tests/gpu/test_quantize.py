"""Calibration on a GPU: the model stays on the CPU, and one block at a time is on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from awq_core.hf.quantize import QuantizeReport, quantize
from awq_core.testing.tiny import tiny_model

LETTERS = [chr(code) for code in range(32, 127)]
QUICK: dict[str, Any] = {"group_size": 32, "calib_samples": 8, "calib_length": 64}


@pytest.fixture(params=["llama", "qwen3_moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dense model with a tokenizer of single characters."""
    folder = tiny_model(tmp_path / "dense", request.param)
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)} | {"?!": 127}, unk_token="?!"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?!").save_pretrained(folder)
    return folder


def error(report: QuantizeReport) -> float:
    """The share of the linears' outputs that rounding changes, by energy."""
    groups = [group for block in report.blocks for group in block["groups"]]
    return sum(group["loss"] for group in groups) / sum(group["signal"] for group in groups)


@pytest.mark.parametrize(
    "options",
    [{}, {"propagate": True, "correct": 0.5, "tie_heads": True}, {"feedback": False}, {"layout": "gemv"}],
    ids=str,
)
def test_it_is_as_good_as_on_the_cpu(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    here = quantize(source, tmp_path / "cpu", **QUICK, **options)
    there = quantize(source, tmp_path / "cuda", device="cuda", **QUICK, **options)
    assert there.quantized == here.quantized
    assert there.notes == here.notes
    assert error(there) == pytest.approx(error(here), rel=0.05)


def test_the_same_bytes_twice_and_after_a_stop(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        if (done, total) == (1, 2):
            raise KeyboardInterrupt

    quantize(source, tmp_path / "one", device="cuda", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "two", device="cuda", **QUICK, progress=stop)
    quantize(source, tmp_path / "two", device="cuda", **QUICK, resume=True)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_nothing_stays_on_the_gpu(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "first", device="cuda", **QUICK)
    before = torch.cuda.memory_allocated()
    quantize(source, tmp_path / "second", device="cuda", **QUICK)
    assert torch.cuda.memory_allocated() <= before
