"""The command line ``awq``: one file a command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import backends, bench, compare, demo, evaluate, explain, generate, inspect, matrix, new_backend, quantize, tune
from ._errors import Guarded
from ._help import PlainCommand

app = typer.Typer(
    name="awq",
    cls=Guarded,
    help="Run, make and look into AWQ 4-bit language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"awq-core {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run, make and look into AWQ 4-bit language models."""


for _name, _command, _short in (
    ("inspect", inspect.inspect, "What a checkpoint holds, its sizes, what is odd."),
    ("explain", explain.explain, "Which kernel each linear gets, and why not the others."),
    ("backends", backends.backends, "Which kernel backends there are, and which run here."),
    ("generate", generate.generate, "Let a checkpoint answer a prompt."),
    ("quantize", quantize.quantize, "Make a 4-bit checkpoint of a dense model."),
    ("eval", evaluate.eval_command, "Perplexity, and KL divergence from the dense model."),
    ("compare", compare.compare, "Two checkpoints of one model, side by side."),
    ("bench", bench.bench, "Speed of prefill and decoding, and memory."),
    ("tune", tune.tune, "Find the fastest way to run each kernel on this GPU."),
    ("demo", demo.demo, "All of it with a small model: quantize, load, answer."),
    ("matrix", matrix.matrix, "Write the documents' table of kernels by device."),
    ("new-backend", new_backend.new_backend, "Write a backend of your own to start from."),
):
    app.command(_name, cls=PlainCommand, short_help=_short)(_command)


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="awq")
