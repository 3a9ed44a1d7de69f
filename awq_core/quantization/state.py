"""What a run has finished, on disk: after a kill it continues at the block where it was, with the same result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..errors import CheckpointError
from .block import Hidden
from .write import disk_errors, write_json

GO_ON = "and the same command with --resume goes on there (resume=True in Python)"


@dataclass(frozen=True)
class State:
    """A folder beside the result. ``plan`` is all that decides the result: a run continues only under the same plan."""

    folder: Path
    plan: Mapping[str, Any]

    @classmethod
    def beside(cls, out: Path, plan: Mapping[str, Any]) -> State:
        """The state of the run that writes ``out``."""
        return cls(_folder(out), json.loads(json.dumps(plan)))

    def begin(self, resume: bool) -> int:
        """Make the folder, or with ``resume`` find out how many blocks are done.

        Raises:
            CheckpointError: the finished part was made under another plan (it says what differs).
        """
        file = self.folder / "plan.json"
        if resume and file.is_file():
            found = json.loads(file.read_text("utf-8"))
            if found != self.plan:
                differ = sorted(k for k in {*found, *self.plan} if found.get(k) != self.plan.get(k))
                raise CheckpointError(
                    f"{self.folder} cannot be continued: it was begun with another {', '.join(differ)}; "
                    "repeat those options, or leave --resume out to begin again"
                )
            return self.done()
        shutil.rmtree(self.folder, ignore_errors=True)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True)
            write_json(file, self.plan)
        return 0

    def save(self, number: int, tensors: dict[str, torch.Tensor], record: Mapping[str, Any], hidden: Hidden) -> None:
        """Block ``number`` is finished. The file of hidden states is renamed last: it says that all is there."""
        with disk_errors(self.folder, f"; finished blocks are kept ({number}), {GO_ON}" if number else ""):
            write_json(self._record(number), record)
            _save(tensors, self._tensors(number))
            states = {f"seen.{i}": x for i, x in enumerate(hidden.seen)}
            states |= {f"dense.{i}": x for i, x in enumerate(hidden.dense or [])}
            _save(states, self._hidden(number))
            if number:
                self._hidden(number - 1).unlink(missing_ok=True)

    def hidden(self, number: int) -> Hidden:
        """The hidden states after block ``number``."""
        found = load_file(self._hidden(number))
        seen = [found[f"seen.{i}"] for i in range(sum(name.startswith("seen.") for name in found))]
        dense = [found[f"dense.{i}"] for i in range(len(found) - len(seen))]
        return Hidden(seen, dense or None)

    def records(self, blocks: int) -> list[dict[str, Any]]:
        """What was noted for each block."""
        return [json.loads(self._record(number).read_text("utf-8")) for number in range(blocks)]

    def tensors(self, blocks: int) -> Tensors:
        """The tensors of all blocks, read when asked for."""
        return Tensors([self._tensors(number) for number in range(blocks)])

    def remove(self) -> None:
        """The result is written: nothing is left to continue."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def done(self) -> int:
        """How many blocks are finished."""
        found = [int(file.stem.rpartition("-")[2]) for file in self.folder.glob("hidden-*.safetensors")]
        done = max(found, default=-1) + 1
        return done if all(self._tensors(n).is_file() and self._record(n).is_file() for n in range(done)) else 0

    def _tensors(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.safetensors"

    def _record(self, number: int) -> Path:
        return self.folder / f"block-{number:05d}.json"

    def _hidden(self, number: int) -> Path:
        return self.folder / f"hidden-{number:05d}.safetensors"


def finished(out: Path) -> int:
    """How many blocks of a run that was to write ``out`` are kept."""
    return State(_folder(out), {}).done()


class Tensors:
    """Names to files, and tensors out of them one at a time."""

    def __init__(self, files: list[Path]) -> None:
        self.places: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self.places |= dict.fromkeys(opened.keys(), file)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def get(self, name: str) -> torch.Tensor:
        """The tensor called ``name``."""
        with safe_open(self.places[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor


def _folder(out: Path) -> Path:
    out = out.absolute()
    return out.with_name(f".{out.name}.awq-state")


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    partial = file.with_name(f"{file.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    except BaseException:
        partial.unlink(missing_ok=True)  # a disk that is full has no room for it
        raise
    partial.rename(file)
