"""The command line ``awq``: one file a command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from ._errors import Guarded
from .backends import backends
from .demo import demo
from .explain import explain
from .generate import generate
from .inspect import inspect
from .matrix import matrix
from .quantize import quantize

app = typer.Typer(
    name="awq",
    cls=Guarded,
    help="Run, make and look into AWQ 4-bit language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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


for command in (inspect, explain, backends, generate, quantize, demo, matrix):
    app.command()(command)


def main() -> None:
    """Entry point of the console script ``awq``."""
    app(prog_name="awq")
