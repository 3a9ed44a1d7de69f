from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from awq_core.cli import app


def awq(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "240"})


def data(*args: object) -> Any:
    result = awq(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*args: object) -> str:
    result = awq(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


def dense_model(folder: Path, **overrides: Any) -> Path:
    """A tiny random Llama with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from awq_core.testing.tiny import tiny_model

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=overrides.pop("reverse", False))
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tiny_model(folder, vocab_size=256, initializer_range=0.2, **overrides)
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_model(tmp_path_factory.mktemp("eval") / "dense")


@pytest.fixture(scope="module")
def awq4(dense: Path) -> Path:
    from awq_core.hf.quantize import quantize

    return quantize(dense, dense.parent / "awq", group_size=32, method="rtn").out


def test_eval_of_one_model(awq4: Path) -> None:
    found = data("eval", awq4, "--context", 64, "--windows", 3)
    assert (found["context"], found["stride"], found["windows"], found["predictions"]) == (64, 64, 3, 189)
    assert found["text"].startswith("the beginning of Persuasion")
    (line,) = found["models"]
    assert line["path"] == str(awq4)
    assert line["kind"] == "AWQ g32 bfloat16"
    assert (line["kl"], line["top1_agreement"], line["reference"]) == (None, None, False)
    assert line["perplexity"] == pytest.approx(math.exp(line["nll"]))
    assert line["disk_bytes"] == (awq4 / "model.safetensors").stat().st_size


def test_eval_against_the_dense_model(dense: Path, awq4: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 20)
    options = ("--text", text, "--context", 64, "--stride", 32, "--windows", 0)
    found = data("eval", awq4, "--against", dense, *options)
    assert found["text"] == str(text)
    assert (found["windows"], found["predictions"]) == (19, 63 + 18 * 32)
    first, second = found["models"]
    assert (first["path"], first["reference"], first["kl"], first["top1_agreement"]) == (str(dense), True, 0.0, 1.0)
    assert 0 < second["kl"] < 1
    assert 0.3 < second["top1_agreement"] < 1
    assert second["memory_bytes"] < first["memory_bytes"]
    shown = awq("eval", awq4, "--against", dense, *options).stdout
    assert f"{second['perplexity']:.3f}" in shown
    assert f"{second['kl']:.4f}" in shown
    names, cells = (
        re.split(r" {2,}", next(line for line in shown.splitlines() if word in line).strip())
        for word in ("perplexity", "AWQ g32")
    )
    assert names[-7:-5] == ["kind", "perplexity"]
    assert cells[-7:-5] == ["AWQ g32 bfloat16", f"{second['perplexity']:.3f}"]
    assert "639 predicted tokens" in shown
    assert "context 64, stride 32; bfloat16 on cpu" in shown


def test_compare(dense: Path, awq4: Path) -> None:
    found = data("compare", dense, awq4, "--context", 64, "--windows", 2)
    one, two = found["models"]
    assert one["reference"]
    assert two["kl"] > 0
    assert found["ratios"]["perplexity"] == pytest.approx(two["perplexity"] / one["perplexity"])
    assert found["ratios"]["on disk"] == pytest.approx(two["disk_bytes"] / one["disk_bytes"])
    shown = awq("compare", dense, awq4, "--context", 64, "--windows", 2).stdout
    assert f"{two['perplexity']:.3f}" in shown
    assert f"KL(A‖B) {two['kl']:.4f} nats" in shown


def test_the_same_weights_have_no_distance(dense: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in dense.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    found = data("compare", dense, copy, "--context", 32, "--windows", 2)
    assert found["models"][1]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["models"][1]["top1_agreement"] == 1.0


def test_what_is_refused(dense: Path, awq4: Path, tmp_path: Path) -> None:
    assert refused("eval", tmp_path / "no") == f"{tmp_path / 'no'}: no such folder"
    assert refused("compare", dense, tmp_path / "no") == f"{tmp_path / 'no'}: no such folder"
    assert "given twice" in refused("compare", dense, dense)
    assert "No such file" in refused("eval", dense, "--text", tmp_path / "no.txt")
    (tmp_path / "short.txt").write_text("too short")
    assert "has 9 tokens" in refused("eval", dense, "--text", tmp_path / "short.txt", "--context", 32)
    assert "256 positions" in refused("eval", dense, "--context", 512)
    assert "no such GPU" in refused("eval", dense, "--device", "cuda:9")
    assert "not understood" in refused("eval", dense, "--device", "toaster")
    other = dense_model(tmp_path / "other", reverse=True)
    assert "different tokenizers" in refused("compare", dense, other, "--context", 32)
    assert awq("eval").exit_code == 2


def test_ctrl_c_ends_quietly(dense: Path) -> None:
    """With a real process and a real signal, in the middle of the evaluation."""
    code = (
        "import signal, sys, awq_core.cli as cli, awq_core.evaluation.scores as s\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job begins with it ignored
        "real = s._logits\n"
        "def slow(*a):\n"
        "    print('running', flush=True); import time; time.sleep(20); return real(*a)\n"
        "s._logits = slow\n"
        f"sys.argv = ['awq', 'eval', {str(dense)!r}, '--context', '32']\n"
        "cli.main()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "running\n"
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=15)
    assert running.returncode == 130
    assert "Traceback" not in said
