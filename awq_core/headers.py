"""The headers of weight files: name, dtype and shape of every tensor. No tensor is read, no pickled code is run."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .layouts.detect import TensorHeader

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library

# safetensors' names -> torch's names and the bytes of one element
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
}


def read_headers(files: Sequence[Path | str]) -> dict[str, TensorHeader]:
    """Name -> header of every tensor in ``files`` (safetensors, or PyTorch files by any other suffix); no data is read.

    Raises:
        CheckpointError: a file is missing, empty, truncated, corrupt or unsafe, or two files hold the same tensor.
    """
    headers: dict[str, TensorHeader] = {}
    for path in map(Path, files):
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)
        for name, header in found.items():
            if name in headers:
                raise CheckpointError(
                    f"{path}: the tensor {name} is in {headers[name].file} too; remove one of the files"
                )
            headers[name] = header
    return headers


def _read_safetensors(path: Path) -> dict[str, TensorHeader]:
    """The header: 8 bytes of length (little endian), that much JSON, then the data without holes."""
    size = _size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{path}: truncated, {size} bytes cannot hold a header; download it again")
            if length > MAX_HEADER:
                raise _corrupt(path, f"a header of {length} bytes cannot be")
            if size < 8 + length:
                raise CheckpointError(
                    f"{path}: truncated, {size} bytes are less than its header needs ({8 + length}); download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({str(error)[:80]})") from error
    if not isinstance(entries, dict):
        raise _corrupt(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    headers: dict[str, TensorHeader] = {}
    for name, entry in entries.items():
        headers[name], begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
    _check_spans(path, sorted(spans), size - 8 - length)
    return headers


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if a key stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorHeader, int, int]:
    """One tensor's header and the span of its bytes in the data."""
    if not isinstance(entry, dict):
        raise _corrupt(path, f"the entry of {name!r} is not an object")
    dtype, shape, span = entry.get("dtype"), _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2 or span[0] > span[1]:
        raise _corrupt(path, f"the entry of {name!r} lacks a valid dtype, shape or data_offsets")
    torch_name, width = _DTYPES.get(dtype, (dtype.lower(), 0))
    # A dtype that we don't know (a newer one, or smaller than a byte) has no width here: its span is taken as it is.
    if width and math.prod(shape) * width != span[1] - span[0]:
        raise _corrupt(
            path, f"{name!r} is {dtype} {list(shape)}, which is not the {span[1] - span[0]} bytes that it takes"
        )
    return TensorHeader(torch_name, shape, str(path)), span[0], span[1]


def _naturals(value: Any) -> tuple[int, ...] | None:
    """A JSON list of sizes or offsets, or None if it is anything else."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        return tuple(value)
    return None


def _check_spans(path: Path, spans: list[tuple[int, int, str]], size: int) -> None:
    """The spans must cover the data, without holes or overlaps."""
    last = 0
    for begin, end, name in spans:
        if begin != last:
            raise _corrupt(path, f"the data of {name!r} begins at byte {begin}, not at {last}")
        last = end
    if last > size:
        raise CheckpointError(
            f"{path}: truncated, {size} bytes of data where its header says {last}; download it again"
        )
    if last < size:
        raise _corrupt(path, f"{size} bytes of data where its header says {last}")


def _read_pytorch(path: Path) -> dict[str, TensorHeader]:
    """The headers of a file of ``torch.save``, read without running any code of it."""
    import torch

    _size(path)
    try:
        # Only the zip format can be mapped; the older one has to be read.
        state = torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location="meta")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a PyTorch file of tensors only, and loading anything else may run code: "
            "convert the checkpoint to safetensors"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # torch documents none: a broken zip or pickle shows as almost any error
        raise CheckpointError(
            f"{path}: truncated or not a PyTorch file ({_brief(error)}); download it again"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a mapping from names to tensors")
    return {
        str(name): TensorHeader(str(value.dtype).removeprefix("torch."), tuple(value.shape), str(path))
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _size(path: Path) -> int:
    """The size in bytes; CheckpointError if the file is missing, empty or no file."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; is the download complete?")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    if not (size := path.stat().st_size):
        raise CheckpointError(f"{path}: the file is empty; download it again")
    return size


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a valid safetensors file: {why}; download it again")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What the operating system said against reading ``path``."""
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:80] or type(error).__name__
