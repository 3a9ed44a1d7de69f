"""What the user sees when a command fails: one sentence on stderr and exit code 2, or 130 after Ctrl-C.

Only errors that are meant for the user end so; anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import AwqError

FAILED = 2
INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__mro__[1]  # of click, which some versions of typer carry inside


class Guarded(TyperGroup):
    """The group of all commands, with our errors turned into exit codes."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        """Parse what stands before the command's name."""
        given = list(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except UsageError as error:
            if not given:  # `awq` alone prints the help
                raise
            fail(_usage_sentence(error))

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader (head, less) has seen enough: typer ends quietly
            raise
        except AwqError as error:
            fail(str(error))
        except UsageError as error:
            fail(_usage_sentence(error))
        except OSError as error:
            fail(_os_sentence(error))
        except KeyboardInterrupt:
            interrupted("interrupted")


def fail(message: str) -> NoReturn:
    """Say ``error: message`` on stderr and leave with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(FAILED)


def interrupted(message: str) -> NoReturn:
    """Say so on stderr, on a line of its own, and leave as a command does that Ctrl-C ended."""
    print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr)
    raise typer.Exit(INTERRUPTED) from None


def _os_sentence(error: OSError) -> str:
    """``path: No space left on device``, or the first lines of an OSError that carries only text."""
    if error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


def _usage_sentence(error: Any) -> str:
    """What is wrong with the command line, and where to look."""
    said = error.format_message().replace("Value error, ", "").rstrip(".")
    path = error.ctx.command_path if error.ctx is not None else "awq"
    return f"{said[:1].lower()}{said[1:]}; {path} --help lists what there is"
