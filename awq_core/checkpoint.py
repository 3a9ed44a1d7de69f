"""A checkpoint on disk before any tensor is read: its files, their headers, its quantized modules, its raw config.

Every fault of the files is a CheckpointError of one sentence that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, ConfigError, LayoutError
from .headers import read_headers, unreadable
from .layouts.detect import Detected, ModuleHeader, TensorHeader, detect

if TYPE_CHECKING:
    import torch

__all__ = [
    "TensorHeader",
    "check_finite",
    "checkpoint_files",
    "module_headers",
    "quantized_modules",
    "read_config",
    "read_headers",
]

LEGACY_FILES = ("quant_config.json", "quantize_config.json")  # of AutoAWQ before 0.1.8, llm-awq, AutoGPTQ
SHOWN = 5


def checkpoint_files(folder: Path | str) -> list[Path]:
    """The weight files of a model folder, in the order in which transformers looks for them.

    ``model.safetensors``, or the shards of its index, or ``pytorch_model.bin``, or the shards of its index.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: not a folder")
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _shards(folder / f"{name}.index.json")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder}: the folder is empty, it holds no checkpoint")
    raise CheckpointError(
        f"{folder}: holds neither {' nor '.join(names)}, nor an index of shards; is the download complete?"
    )


def _shards(index: Path) -> list[Path]:
    """The files of a sharded checkpoint, each once, sorted; CheckpointError if one is missing."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{index}: has no weight_map from tensor names to files; download it again")
    names = sorted(set(places.values()))
    if strange := [name for name in names if "\0" in name or Path(name).name != name]:
        raise CheckpointError(f"{index}: the shard {strange[0]!r} is not the name of a file in this folder")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(names)} shards are missing: {_some(missing)}; download them again"
        )
    return [index.parent / name for name in names]


def module_headers(headers: Mapping[str, TensorHeader]) -> dict[str, ModuleHeader]:
    """The quantized modules, those with a ``.qweight`` key, each with all its tensors, in the files' order."""
    tensors: dict[str, dict[str, TensorHeader]] = {
        name.removesuffix(".qweight"): {} for name in headers if name.endswith(".qweight")
    }
    for name, header in headers.items():
        module, _, suffix = name.rpartition(".")
        if module in tensors:
            tensors[module][suffix] = header
    return {name: ModuleHeader(name, found) for name, found in tensors.items()}


def quantized_modules(
    headers: Mapping[str, TensorHeader],
    group_size: int | None = None,
    in_out: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Detected]:
    """What each quantized module is, by name.

    ``group_size`` is the config's claim, ``in_out`` gives (K, N) by module where that is known.

    Raises:
        CheckpointError: a module lacks its scales or zeros, or zeros lie there without a qweight (all are listed).
        LayoutError: modules lie in no known layout (up to 5 are listed).
    """
    modules = module_headers(headers)
    if missing := _missing(headers, modules):
        raise CheckpointError(
            f"{headers[missing[0][1]].file}: {len(missing)} tensors of quantized modules are missing: "
            f"{_some(name for name, _ in missing)}; is the download complete?"
        )
    found: dict[str, Detected] = {}
    faults: list[str] = []
    for name, module in modules.items():
        try:
            found[name] = detect(module, group_size, (in_out or {}).get(name))
        except LayoutError as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise LayoutError(faults[0])
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:SHOWN])
        more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise LayoutError(f"{len(faults)} of {len(modules)} quantized modules cannot be read:\n{shown}{more}")
    return found


def _missing(headers: Mapping[str, TensorHeader], modules: Mapping[str, ModuleHeader]) -> list[tuple[str, str]]:
    """(the tensor that is missing, a tensor of the same module that is there)."""
    missing: list[tuple[str, str]] = []
    for name, module in modules.items():
        present = f"{name}.qweight"
        scales = module.tensors.get("scales")
        if scales is None:
            missing.append((f"{name}.scales", present))
        # Marlin has no zeros: its qweight has two words for each column of scales, which gemm's never has.
        weight = module.tensors["qweight"]
        marlin = scales is None or (
            weight.dtype == "int32" and weight.shape[-1:] == tuple(2 * n for n in scales.shape[-1:])
        )
        if not {"qzeros", "scaled_zeros"} & module.tensors.keys() and not marlin:
            missing.append((f"{name}.qzeros", present))
    for name in headers:
        module_name, _, suffix = name.rpartition(".")
        if suffix in ("qzeros", "scaled_zeros") and module_name not in modules:
            missing.append((f"{module_name}.qweight", name))
    return missing


def check_finite(name: str, tensor: torch.Tensor, file: Path | str | None = None) -> None:
    """CheckpointError if a floating-point tensor (scales, scaled zeros, bias) called ``name`` holds NaN or inf."""
    import torch

    if not tensor.is_floating_point() or tensor.device.type == "meta" or bool(torch.isfinite(tensor).all()):
        return
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    where = f"{file}: " if file is not None else ""
    raise CheckpointError(
        f"{where}{name} holds NaN or inf in {bad} of {tensor.numel()} values: "
        "the file is damaged or was quantized badly; download it again or quantize the model again"
    )


def read_config(folder: Path | str) -> dict[str, Any]:
    """The raw quantization config of a model folder, unchecked but for its ``quant_method``.

    From ``config.json`` (``quantization_config``, there or in ``text_config``), else the whole of a legacy
    ``quant_config.json`` or ``quantize_config.json``.

    Raises:
        CheckpointError: the folder has no config.json, it is not JSON, or the model is not quantized.
        ConfigError: it was quantized by another method.
    """
    found = _said(Path(folder))
    if found is None:
        raise CheckpointError(
            f"{folder}: this model is not quantized (its config.json has no quantization_config): "
            f"run `awq quantize MODEL OUT` first and use OUT"
        )
    return found


def is_quantized(folder: Path | str) -> bool:
    """Whether a model folder holds an AWQ model; False for a dense one. Raises what ``read_config`` does otherwise."""
    return _said(Path(folder)) is not None


def _said(folder: Path) -> dict[str, Any] | None:
    """The raw quantization config, None for a dense model."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: not a folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is not a model folder of transformers")
    path, config = folder / "config.json", _read_json(folder / "config.json")
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not found:
        legacy = [folder / name for name in LEGACY_FILES if (folder / name).is_file()]
        if not legacy:
            return None
        path, found = legacy[0], _read_json(legacy[0])
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: quantization_config is a {type(found).__name__}, it has to be an object")
    method = found.get("quant_method")
    if method is None and "desc_act" in found:
        method = "gptq"  # AutoGPTQ's quantize_config.json did not name its method
    if method is not None and str(method).lower() != "awq":
        raise ConfigError(
            f"{path}: this is a {method} checkpoint, and awq-core reads AWQ only; load it without awq-core"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:80]}); download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: has to hold a JSON object, got {type(found).__name__}")
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
