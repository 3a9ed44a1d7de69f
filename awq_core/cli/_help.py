"""What ``--help`` prints: plain lines, from the same rows as the reference in the documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.core import TyperCommand


@dataclass(frozen=True)
class Parameter:
    """One argument or option of a command, in words."""

    names: tuple[str, ...]
    value: str  # what stands behind the name; nothing for a flag
    help: str
    default: str  # what it is when left out; "required" where it cannot be


@dataclass(frozen=True)
class Usage:
    """How a command is called."""

    line: str  # behind the command's name
    arguments: tuple[Parameter, ...]
    options: tuple[Parameter, ...]


def usage(command: Any) -> Usage:
    """The arguments and options of ``command``, a command of typer's."""
    kinds = get_type_hints(inspect.unwrap(command.callback))
    arguments = tuple(_argument(p) for p in command.params if p.param_type_name == "argument")
    shown = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    words = [*(argument.names[0] for argument in arguments), *(["[OPTIONS]"] if shown else [])]
    return Usage(" ".join(words), arguments, tuple(_option(p, kinds.get(p.name)) for p in shown))


def _argument(parameter: Any) -> Parameter:
    name = parameter.metavar or parameter.name.upper()
    required = "required" if parameter.required else ""
    return Parameter((name if parameter.required else f"[{name}]",), "", _words(parameter), required)


def _option(parameter: Any, kind: Any) -> Parameter:
    flag = parameter.is_flag
    names = (*parameter.opts, *parameter.secondary_opts) if flag else tuple(parameter.opts)
    return Parameter(names, "" if flag else parameter.metavar or _kind(kind), _words(parameter), _default(parameter))


def _words(parameter: Any) -> str:
    return " ".join((parameter.help or "").split())


def _kind(kind: Any) -> str:
    """``Literal["a", "b"] | None`` as ``a|b``; other types by their name."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    name: str = kind.__name__
    return {"int": "N", "str": "TEXT"}.get(name, name.upper())


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required:
        return "required"
    if default is None or default is False or default in ((), []):
        return ""
    return parameter.opts[0] if parameter.is_flag else str(default)


class PlainCommand(TyperCommand):
    """A command whose help is plain lines, whichever version of typer is installed."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the line that shows how to call it."""
        formatter.write_usage(ctx.command_path, usage(self).line)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, what the command does, arguments and options."""
        self.format_usage(ctx, formatter)
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(paragraph.replace("`", ""))
        known = usage(self)
        _table(formatter, "Arguments", known.arguments, " ".join)
        own = Parameter(("--help",), "", "Show this message and exit.", "")
        _table(formatter, "Options", (*known.options, own), _option_names)


def _option_names(names: tuple[str, ...]) -> str:
    return " / ".join(names) if names[-1].startswith("--no-") else ", ".join(sorted(names, key=len))


def _table(
    formatter: Any, title: str, parameters: tuple[Parameter, ...], join: Callable[[tuple[str, ...]], str]
) -> None:
    if not parameters:
        return
    rows = []
    for parameter in parameters:
        default = parameter.default if parameter.default in ("", "required") else f"default: {parameter.default}"
        said = f"{parameter.help} [{default}]" if default else parameter.help
        rows.append((f"{join(parameter.names)} {parameter.value}".rstrip(), said))
    with formatter.section(title):
        formatter.write_dl(rows)
