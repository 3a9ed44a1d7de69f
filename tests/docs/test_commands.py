"""A newcomer's commands: those of the README and the first pages are run, in order, on tiny models.

The folders that the pages name (``PATH``, ``mistral-awq``, ``smollm2``, ...) are there; ``demo`` is given its model.
Options that only make a command quick are added.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import awq_core
from awq_core.bench import machine
from awq_core.bench.models import CONFIGS
from awq_core.cli import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/quickstart.md", "docs/quantizing.md", "docs/choosing.md", "docs/benchmarks.md")
AWQ = ("PATH", "A", "B", "mistral-awq", "another-awq")
DENSE = ("MODEL", "smollm2")
SHORT = "--context 16 --windows 2"
QUICK = {
    "generate": "--max-new-tokens 2",
    "quantize": "--calib-samples 2 --calib-length 16",
    "eval": SHORT,
    "compare": SHORT,
    "bench": "--prefill 8 --decode 2 --repeats 1 --group-size 32",
    "demo": "--model MODEL --max-new-tokens 2",
}
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def commands(page: str) -> list[str]:
    """The ``awq`` lines of a page's shell blocks."""
    text = (ROOT / page).read_text("utf-8")
    found = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in found for line in block.splitlines() if line.startswith("awq ")]


@pytest.fixture
def place(models_with_tokenizer: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with all that the pages speak of; what the commands change in this process is put back."""
    dense, quantized = models_with_tokenizer
    for source, names in ((dense, DENSE), (quantized, AWQ)):
        for name in names:
            shutil.copytree(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(
        CONFIGS, "mistral-7b", ("mistral", SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2})
    )
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    yield
    awq_core.disable()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run_in_order(page: str, place: None) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        result = CliRunner().invoke(app, [*words, *shlex.split(QUICK.get(words[0], ""))], env={"COLUMNS": "120"})
        if words[0] == "tune" and not torch.cuda.is_available():
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            continue
        assert result.exit_code == 0, f"{line}: {result.output}"
        assert result.stdout.strip(), line
        assert "Warning" not in result.stderr, f"{line}: {result.stderr}"


def test_every_command_is_in_the_readme() -> None:
    named = {line.split()[1] for line in commands("README.md")}
    assert named >= {
        "inspect",
        "explain",
        "backends",
        "generate",
        "quantize",
        "eval",
        "compare",
        "bench",
        "tune",
        "demo",
    }
