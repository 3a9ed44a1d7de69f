"""docs/reference/cli.md, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from awq_core.cli import app

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
    kinds = get_type_hints(inspect.unwrap(command.callback))
    positional = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    yield f"## awq {name}\n"
    usage = " ".join(["awq", name, *map(_positional, positional), *(["[OPTIONS]"] if options else [])])
    yield f"```bash\n{usage}\n```\n"
    yield f"{inspect.cleandoc(command.help or '')}\n"
    if positional or options:
        yield "| | | default |\n| --- | --- | --- |"
        for p in positional:
            yield f"| `{_positional(p)}` | {_help(p)} | {'required' if p.required else ''} |"
        for p in options:
            yield f"| {_names(p, kinds.get(p.name))} | {_help(p)} | {_default(p)} |"
        yield ""


def _positional(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _help(parameter: Any) -> str:
    return " ".join((parameter.help or "").split()).replace("|", "\\|")


def _names(parameter: Any, kind: Any) -> str:
    names = [f"`{name}`" for name in parameter.opts]
    if parameter.is_flag:
        return ", ".join(names + [f"`{name}`" for name in parameter.secondary_opts])
    return f"{', '.join(names)} `{parameter.metavar or _kind(kind)}`"


def _kind(kind: Any) -> str:
    r"""``Literal["a", "b"] | None`` as ``a\|b``; other types by their name."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return "\\|".join(map(str, get_args(kind)))
    return getattr(kind, "__name__", str(kind)).upper()


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if default is None or default in (False, (), []):
        return ""
    return f"`{parameter.opts[0]}`" if parameter.is_flag else f"`{default}`"
