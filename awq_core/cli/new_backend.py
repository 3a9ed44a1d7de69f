"""``awq new-backend``: a complete distribution with two working kernels, to start a backend from."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError

SUFFIX = ".tmpl"  # keeps the template's files from being taken for ours (imported, linted, read as configuration)


def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What users ask for: AwqConfig(version=NAME).")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", help="Folder to write; new or empty. Left out: awq-NAME.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a backend to start from: a distribution awq-NAME with two kernels, its tests and a CI file.

    One kernel is plain torch with a layout of its own, the other is Triton for GPUs of NVIDIA and AMD. Both work.
    """
    check_name(name)
    target = write(name, folder or Path(f"awq-{name}"))
    print(f"{target} is written. Next: pip install -e '{target}[test]' && pytest {target}, then `awq backends`")


def check_name(name: str) -> None:
    """ConfigError unless a third party can call its backend so."""
    from .. import plugins
    from ..kernel import NAME, NAME_RULE

    if NAME.fullmatch(name) is None or not name[-1].isalnum():
        raise ConfigError(f"backend name {name!r} is not {NAME_RULE} that begins and ends with a letter or a digit")
    source = plugins.registry().sources.get(name)
    if name == "core" or (source is not None and source.distribution == plugins.OURS):
        raise ConfigError(f"backend name {name!r} is taken by {plugins.OURS} itself: choose another")


def write(name: str, folder: Path) -> Path:
    """Write the distribution into ``folder``, which must be new or empty; nothing is left behind by a failure."""
    from .._version import __version__

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: choose another with --dir")
    words = {"@NAME@": name, "@MODULE@": re.sub("-", "_", name), "@VERSION@": __version__}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".awq-new-", dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        _copy(files("awq_core") / "template", made, words)
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)
    return folder


def _copy(source: Traversable, target: Path, words: dict[str, str]) -> None:
    target.mkdir()
    for item in source.iterdir():
        name = item.name.replace("MODULE", words["@MODULE@"])
        if item.is_dir():
            _copy(item, target / name, words)
        elif name.endswith(SUFFIX):
            text = item.read_text(encoding="utf-8")
            for word, value in words.items():
                text = text.replace(word, value)
            (target / name.removesuffix(SUFFIX)).write_text(text, encoding="utf-8")
