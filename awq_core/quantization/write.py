"""Writing a checkpoint folder: shard by shard under a temporary name, renamed when it is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import CheckpointError

EXISTS = "{} exists already: choose another folder, or replace it (--overwrite, or overwrite=True)"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


@contextlib.contextmanager
def new_folder(out: Path, overwrite: bool = False, left: str = "nothing is left of the attempt") -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and vanishes otherwise.

    ``left`` is said where the disk fails.

    Raises:
        CheckpointError: ``out`` exists and is not empty (unless ``overwrite``), or the disk is full or read-only.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise CheckpointError(EXISTS.format(out))
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            old = out.with_name(f".{out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            try:
                partial.rename(out)
            except BaseException:
                old.rename(out)
                raise
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} was not written: {_why(error)}; {left}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(place: Path, left: str = "") -> Iterator[None]:
    """Turn a full or read-only disk into a CheckpointError; what was written before stays, of which ``left`` speaks."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{place} cannot be written: {_why(error)}{left}") from error


def _why(error: Exception) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    if full:
        return "the disk is full"
    return getattr(error, "strerror", None) or " ".join(str(error).split())


@dataclass
class ShardWriter:
    """Collects tensors and writes a safetensors file whenever ``max_bytes`` are together."""

    folder: Path
    max_bytes: int
    total: int = 0
    _pending: dict[str, torch.Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _files: list[list[str]] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it is held until its shard is written."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total += size

    def close(self) -> None:
        """Write what is left, name the shards as transformers does, and write the index if there are several."""
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, start=1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        if self._pending:
            self._files.append(list(self._pending))
            save_file(self._pending, self._file(len(self._files)), metadata={"format": "pt"})
            self._pending, self._pending_bytes = {}, 0

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, chat template, licence: all files of a model folder but weights and config."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHT_ENDINGS):
            shutil.copyfile(file, target / file.name)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write ``data`` as indented JSON; ``path`` is there only when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
