"""A checkpoint as the commands see it: its config and headers, and the linears that they add up to."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import checkpoint_files, quantized_modules, read_config, read_headers
from ..config import CheckpointConfig
from ..errors import CheckpointError
from ..layouts.detect import Detected, TensorHeader
from ..spec import Device, LinearSpec

FLOATS = ("float16", "bfloat16", "float32", "float64")
# transformers 5 stacks the experts of a block in two weights, gate joined with up
EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<index>\d+)\.(?P<part>w[123]|(?:gate|up|down)_proj)")
JOINED = {"w1": "gate_up", "w3": "gate_up", "gate_proj": "gate_up", "up_proj": "gate_up"}


@dataclass(frozen=True)
class Opened:
    """What is read of a checkpoint without reading a tensor. ``model`` is the whole config.json."""

    folder: Path
    model: Mapping[str, Any]
    config: CheckpointConfig
    files: tuple[Path, ...]
    headers: Mapping[str, TensorHeader]
    modules: Mapping[str, Detected]

    @property
    def dense(self) -> dict[str, TensorHeader]:
        """The tensors that belong to no quantized module."""
        return {name: header for name, header in self.headers.items() if name.rpartition(".")[0] not in self.modules}


def open_checkpoint(folder: Path) -> Opened:
    """Open ``folder``; AwqError says what keeps it from being an AWQ checkpoint."""
    raw = read_config(folder)
    config = CheckpointConfig.from_dict(raw, f"{folder}: quantization_config")
    files = checkpoint_files(folder)
    headers = read_headers(files)
    modules = quantized_modules(headers, config.group_size)
    if not modules:
        raise CheckpointError(
            f"{folder}: its config says AWQ, but no tensor of it is quantized (none is named .qweight); "
            "are these the files of the dense model?"
        )
    model = json.loads((folder / "config.json").read_text("utf-8"))
    return Opened(folder, model, config, tuple(files), headers, modules)


def taken_dtype(opened: Opened, device: Device) -> str:
    """The dtype that ``from_pretrained`` takes on ``device`` when the user names none."""
    text = opened.model.get("text_config") or {}
    named = [source.get(key) for source in (opened.model, text) for key in ("dtype", "torch_dtype")]
    stored = [header.dtype for header in opened.headers.values() if header.dtype in FLOATS]
    dtype = next((str(name).removeprefix("torch.") for name in [*named, *stored] if name), "float32")
    return "bfloat16" if dtype == "float16" and device.type == "cpu" else dtype


def linears(opened: Opened, dtype: str, device: Device) -> Counter[LinearSpec]:
    """How often each distinct linear occurs in the model; the experts of a block count as one."""
    counted: Counter[LinearSpec] = Counter()
    experts: dict[tuple[str, str], list[tuple[str, Detected]]] = defaultdict(list)
    for name, found in opened.modules.items():
        expert = EXPERT.fullmatch(name)
        if expert is None:
            counted[_spec(opened, found, found.out_features, dtype, device, 0)] += 1
        else:
            part = JOINED.get(expert["part"], "down")
            experts[expert["block"], part].append((expert["index"], found))
    for parts in experts.values():
        number = len({index for index, _ in parts})
        first = parts[0][1]
        out_features = sum(found.out_features for index, found in parts if index == parts[0][0])
        counted[_spec(opened, first, out_features, dtype, device, number)] += 1
    return counted


def _spec(opened: Opened, found: Detected, out_features: int, dtype: str, device: Device, experts: int) -> LinearSpec:
    zero_point = opened.config.zero_point and found.layout != "marlin"
    return LinearSpec(
        found.in_features, out_features, found.group_size, found.layout, zero_point, found.bias, dtype, device, experts
    )


def tensor_bytes(header: TensorHeader, dtype: str | None = None) -> int:
    """Bytes of a tensor as stored, or once floating point is cast to ``dtype``."""
    name = dtype if dtype is not None and header.dtype in FLOATS else header.dtype
    bits = re.search(r"\d+", name)
    return math.prod(header.shape) * max(1, int(bits[0]) // 8 if bits else 1)
