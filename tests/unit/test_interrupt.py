"""Ctrl-C, half way in every command that takes long: a real process and a real signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from awq_core.cli import app

# The command stops at a step of its progress bar, or at a word of the answer, and says so on stdout.
STOPS = """
import contextlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
from awq_core.cli import _progress
at, *sys.argv[1:] = sys.argv[1:]
def stop():
    print("half way", flush=True)
    time.sleep(60)
@contextlib.contextmanager
def progress_bar(what, screen=None):
    def step(done, total, name):
        if what == at and done:
            stop()
    yield step
_progress.progress_bar = progress_bar
if at == "words":
    from awq_core.hf.generation import Stopwatch
    Stopwatch.put = lambda self, value: stop()
from awq_core.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def quantized(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("interrupt") / "awq"
    result = CliRunner().invoke(app, ["quantize", str(tiny_dense), str(out), "--method", "rtn"])
    assert result.exit_code == 0, result.stderr
    return out


def listing(folder: Path) -> set[str]:
    """All files, but those of PyTorch's compiler, and what ``--resume`` goes on from."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*")}
    return {name for name in found if not name.startswith((".out.awq-state", "temporary/torchinductor"))}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "line"),
    [
        ("quantizing", "quantize DENSE out --calib-samples 2 --calib-length 16"),
        ("quantizing", "quantize DENSE out --method rtn"),
        ("quantizing", "quantize DENSE old --method rtn --overwrite"),
        ("measuring", "demo --model DENSE"),
        ("quantizing", "demo --model DENSE --keep out"),
        ("evaluating", "eval AWQ --against DENSE --context 32"),
        ("bench", "bench AWQ --prefill 8 --decode 2"),
        ("words", "generate AWQ --prompt hello"),
    ],
)
def test_ctrl_c_leaves_nothing_half_written(
    tiny_dense: Path, quantized: Path, tmp_path: Path, at: str, line: str
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    (tmp_path / "temporary").mkdir()
    before = listing(tmp_path)
    words = [{"DENSE": str(tiny_dense), "AWQ": str(quantized)}.get(word, word) for word in line.split()]
    running = subprocess.Popen(
        [sys.executable, "-c", STOPS, at, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary"), "AWQ_CORE_CACHE": str(tmp_path / "cache")},
    )
    assert running.stdout is not None
    lines = iter(running.stdout.readline, "")
    assert any("half way" in text for text in lines)
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert (running.returncode, "Traceback" in said, "Error" in said) == (130, False, False), said
    assert listing(tmp_path) == before
    assert (tmp_path / "old" / "config.json").read_text() == "{}"


def test_ctrl_c_while_the_commands_load_is_quiet() -> None:
    code = (
        "import sys, types, awq_core.__main__ as entry\n"
        "def main(): raise KeyboardInterrupt\n"
        "sys.modules['awq_core.cli'] = types.SimpleNamespace(main=main)\n"
        "entry.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
