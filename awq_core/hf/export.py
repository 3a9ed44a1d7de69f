"""Streaming a dense checkpoint into a new one, tensor by tensor, with some of them replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint import check_finite
from ..errors import CheckpointError
from ..quantization.write import ShardWriter
from .choose import OUTPUT, Choice

Convert = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor] | None]


def tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files, one at a time."""
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    yield key, opened.get_tensor(key)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def rewrite(
    files: Sequence[Path],
    writer: ShardWriter,
    convert: Convert,
    dtype: torch.dtype,
    each: Callable[[int, str], None],
) -> int:
    """Write what ``convert(key, tensor)`` gives for each tensor, the tensor itself in ``dtype`` where it gives None.

    Returns the bytes of the tensors read.
    """
    before = 0
    for done, (key, tensor) in enumerate(tensors(files), start=1):
        before += tensor.numel() * tensor.element_size()
        made = convert(key, tensor)
        for name, new in ({key: tensor} if made is None else made).items():
            stored = made is not None and name.rpartition(".")[2] in ("qweight", "qzeros", "scales")
            writer.add(name, new if stored else cast(name, new, dtype))
        each(done, key)
    writer.close()
    return before


def cast(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` in ``dtype``; CheckpointError if it holds NaN, or values that float16 cannot."""
    if key.endswith((".weight", ".bias")):  # other tensors, such as masks, may hold inf on purpose
        check_finite(key, tensor)
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(made).all()):
        raise CheckpointError(f"{key} has values beyond float16's range: quantize with --dtype bfloat16")
    return made


def new_config(
    source: Path, choice: Choice | None, zero_point: bool, version: str, dtype: str, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """``config.json`` of the result; without ``choice`` the result is dense."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    if choice is None:
        return config
    left_dense = sorted({name for name, why in choice.skipped if why != OUTPUT})
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": choice.group_size,
        "zero_point": zero_point,
        "version": version,
        "modules_to_not_convert": left_dense or None,
        "meta": dict(meta),
    }
    return config
