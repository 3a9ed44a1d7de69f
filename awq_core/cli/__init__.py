"""The command line ``awq``: one file a command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import backends, bench, compare, demo, evaluate, explain, generate, inspect, matrix, new_backend, quantize, tune
from ._errors import Guarded

app = typer.Typer(
    name="awq",
    cls=Guarded,
    help="Run, make and look into AWQ 4-bit language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
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


app.command()(inspect.inspect)
app.command()(explain.explain)
app.command()(backends.backends)
app.command()(generate.generate)
app.command()(quantize.quantize)
app.command("eval")(evaluate.eval_command)
app.command()(compare.compare)
app.command()(bench.bench)
app.command()(tune.tune)
app.command()(demo.demo)
app.command()(matrix.matrix)
app.command()(new_backend.new_backend)


def main() -> None:
    """Entry point of the console script ``awq``."""
    app(prog_name="awq")
