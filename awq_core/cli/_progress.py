"""A progress bar on stderr, for what takes more than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Step = Callable[[int, int | None, str], None]


@contextmanager
def progress_bar(what: str, screen: Console | None = None) -> Iterator[Step]:
    """Show a bar that vanishes at the end; the caller is given ``step(done, total, name)``. Silent in a pipe.

    A total of None is a bar without an end, for one step of unknown length; so it begins.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ._output import console

    screen = screen or console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None, name="")

        def step(done: int, total: int | None, name: str) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield step


def starting() -> AbstractContextManager[Any]:
    """A bar around the imports that take seconds, the first time."""
    return nullcontext() if "torch" in sys.modules else progress_bar("starting")
