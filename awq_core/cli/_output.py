"""Printing: rich tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

WIDE = 160  # columns where the output is a file or a pipe, which has no width


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is: paths may hold brackets, and numbers need no colour."""
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


def print_json(data: Any) -> None:
    """``data`` as one JSON document on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def table(title: str, columns: str, rows: Iterable[Iterable[object]]) -> Table:
    """A table. ``columns`` are headers between ``|``; one that begins with ``>`` is aligned to the right."""
    names = [column.strip() for column in columns.split("|")]
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.show_header = any(names)
    for name in names:
        right = name.startswith(">")
        made.add_column(name.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        cells = [str(cell) for cell in row]
        if len(cells) != len(names):  # rich would add columns without a header
            raise ValueError(f"table {title!r} has {len(names)} columns and a row of {len(cells)}")
        made.add_row(*cells)
    return made


def size(nbytes: int | None) -> str:
    """``269.1 MB`` (powers of ten, as disks and model cards count)."""
    return "?" if nbytes is None else decimal(nbytes)
