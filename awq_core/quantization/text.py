"""Calibration text: files to documents, documents to windows of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

ENDINGS = (".txt", ".md", ".jsonl", ".json", ".parquet")
FIELDS = ("text", "content", "prompt", "question")
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Text:
    """Documents by file name, and a hash of all of it."""

    name: str
    documents: tuple[tuple[str, str], ...]

    @property
    def sha256(self) -> str:
        """Of the names and the texts."""
        whole = hashlib.sha256()
        for name, text in self.documents:
            whole.update(f"{name}\0{text}\0".encode())
        return whole.hexdigest()


def default_text() -> Text:
    """The text that travels with awq-core: parts of the Jargon File and of Emma, both in the public domain."""
    found = [(f.name, f.read_text("utf-8")) for f in (files("awq_core") / "data").iterdir() if f.name.endswith(".txt")]
    return Text("built in: the Jargon File, Emma", tuple(sorted(found)))


def read_text(path: Path) -> Text:
    """The text of a file, or of all files of a folder.

    ``.txt`` and ``.md`` as they are; ``.jsonl`` an object a line with its text in ``text`` (or ``content``, or in
    ``messages``); ``.parquet`` with a column ``text``.

    Raises:
        ConfigError: there is nothing to read, or a file is not what its ending says.
    """
    if path.is_dir():
        found = sorted(f for f in path.iterdir() if f.suffix in ENDINGS and f.is_file())
        if not found:
            raise ConfigError(f"{path} holds no calibration text: put {', '.join(ENDINGS)} files there")
    elif path.is_file():
        found = [path]
    else:
        raise ConfigError(f"{path}: no such file or folder of calibration text")
    documents = []
    for file in found:
        try:
            documents.append((file.name, _read(file)))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} cannot be read as calibration text: byte {error.start} is no UTF-8") from error
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read as calibration text: {' '.join(str(error).split())}") from error
    return Text(str(path), tuple(documents))


def windows(
    text: Text, encode: Encode, samples: int, length: int, seed: int, prefix: Sequence[int] = ()
) -> torch.Tensor:
    """``samples`` windows of ``length`` tokens [samples, length], drawn without overlap and equally from each file.

    ``prefix`` (a beginning-of-text token) starts each window.

    Raises:
        ConfigError: there is too little text.
    """
    if samples < 1 or length < 8 + len(prefix):
        raise ConfigError(f"calibration on {samples} samples of {length} tokens is too little: the usual is 32 of 512")
    generator = torch.Generator().manual_seed(seed)
    body = length - len(prefix)
    drawn: list[list[torch.Tensor]] = []
    total = 0
    for _, document in text.documents:
        ids = torch.tensor(list(encode(document)), dtype=torch.long)
        total += len(ids)
        pieces = list(ids[: len(ids) // body * body].view(-1, body))
        drawn.append([pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()])
    chosen: list[torch.Tensor] = []
    while len(chosen) < samples and any(drawn):
        chosen += [pieces.pop() for pieces in drawn if pieces]
    if not total:
        raise ConfigError(f"{text.name} holds no text to calibrate on: it is empty")
    if len(chosen) < samples:
        raise ConfigError(
            f"{text.name}: {total} tokens of calibration text make {len(chosen)} windows of {length}, wanted "
            f"{samples}: give more text, or ask for fewer or shorter samples (--calib-samples, --calib-length)"
        )
    start = torch.tensor(list(prefix), dtype=torch.long)
    return torch.stack([torch.cat([start, piece]) for piece in chosen[:samples]])


def _read(file: Path) -> str:
    if file.suffix == ".parquet":
        return "\n\n".join(_parquet(file))
    text = file.read_text("utf-8")
    if file.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        return "\n\n".join(_text_of_line(number, line) for number, line in lines if line.strip())
    if file.suffix == ".json":
        found = json.loads(text)
        return "\n\n".join(_text_of(item) for item in (found if isinstance(found, list) else [found]))
    return text


def _text_of_line(number: int, line: str) -> str:
    try:
        return _text_of(json.loads(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is no JSON ({error.msg}, column {error.colno})") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _text_of(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        for name in FIELDS:
            if isinstance(item.get(name), str):
                return str(item[name])
        if isinstance(item.get("messages"), list):
            return "\n".join(str(turn.get("content", "")) for turn in item["messages"] if isinstance(turn, dict))
    raise ValueError(f"an entry has no text (looked for {', '.join(FIELDS)}, messages)")


def _parquet(file: Path) -> list[str]:
    try:
        from importlib import import_module

        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(f"{file}: reading parquet needs pyarrow: pip install pyarrow") from None
    table = parquet.read_table(file)
    name = next((name for name in FIELDS if name in table.column_names), None)
    if name is None:
        raise ValueError(f"no column {', '.join(FIELDS)} among {', '.join(table.column_names)}")
    return [str(value) for value in table.column(name).to_pylist() if value]
