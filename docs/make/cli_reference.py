"""docs/reference/cli.md, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from awq_core.cli import app
from awq_core.cli._help import Parameter, usage

HEAD = """# Command line

Written by `make docs` from the commands themselves; do not edit it by hand. `awq COMMAND --help` prints the same.

Every command ends with exit code 0, with 2 and one sentence on stderr where something is wrong, or with 130 after
Ctrl-C. A file or folder that a command was writing is never left half written. With `--json`, stdout holds one JSON
document and nothing else.
"""


def page() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in group.commands.items():
        if not command.hidden:
            parts.append("\n".join(_command(name, command)))
    return "\n".join(parts)


def _command(name: str, command: Any) -> Iterator[str]:
    known = usage(command)
    yield f"## awq {name}\n"
    yield f"```bash\n{f'awq {name} {known.line}'.rstrip()}\n```\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    if known.arguments or known.options:
        yield "| | | default |\n| --- | --- | --- |"
        for parameter in (*known.arguments, *known.options):
            yield f"| {_names(parameter)} | {_cell(parameter.help)} | {_default(parameter)} |"
        yield ""


def _names(parameter: Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.names)
    return f"{names} `{_cell(parameter.value)}`" if parameter.value else names


def _default(parameter: Parameter) -> str:
    return parameter.default if parameter.default in ("", "required") else f"`{_cell(parameter.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
