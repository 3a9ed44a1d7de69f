"""From calibration text and a model folder to the tensors of the AWQ checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from ..errors import AwqError, CheckpointError, ConfigError, first_line
from ..layouts import Layout
from ..quantization.settings import Settings
from ..quantization.state import State, Tensors
from ..quantization.text import default_text, read_text, windows
from .choose import Choice
from .export import Convert
from .search import Job, Step, search
from .skeleton import Names

SUFFIXES = ("qweight", "qzeros", "scales")


@dataclass(frozen=True)
class Calibrated:
    """How to convert each tensor of the dense checkpoint, and what is to be said about the run."""

    convert: Convert
    quantized: int
    blocks: tuple[Mapping[str, Any], ...]
    meta: Mapping[str, Any]
    notes: list[str]
    finish: Callable[[], None]


def calibrate(
    source: Path,
    out: Path,
    choice: Choice,
    settings: Settings,
    layout: Layout,
    dtype: torch.dtype,
    *,
    calib: Path | None,
    samples: int,
    length: int,
    device: str,
    resume: bool,
    export_dense: bool,
    progress: Step | None,
    names: Names,
    keys: Sequence[str],
) -> Calibrated:
    """Run the search; see ``awq_core.hf.quantize.quantize`` for the options."""
    place = _device(device)
    text = default_text() if calib is None else read_text(calib)
    encode, prefix = _tokenizer(source)
    config = AutoConfig.from_pretrained(source).get_text_config()
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = windows(text, encode, samples, length, settings.seed, prefix)
    model = _load(source)  # after the text, which may be too little
    calibration = {"text": text.name, "sha256": text.sha256, "samples": samples, "length": length}
    options = {"group_size": choice.group_size, **settings.record()}
    plan = {
        "model": _fingerprint(source),
        "calibration": calibration,
        "tokens": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "options": options,
        "layout": layout.name,
        "dtype": str(dtype),
        "left_out": sorted(name for name, _ in choice.skipped),
        "export_dense": export_dense,
        "device": place.type,  # whose sums are rounded otherwise
        "torch": torch.__version__,
    }
    state = State.beside(out, plan)
    job = Job(choice, settings, layout, dtype, place, export_dense)
    count = search(model, ids, job, state, resume, progress)
    records = state.records(count)
    tensors = state.tensors(count)
    del model
    notes = [note for record in records for note in record["notes"]]
    method = "AWQ scales, weights left dense" if export_dense else "AWQ"
    meta = {
        "method": method,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "calibration": calibration,
        "options": options,
        "losses": [_losses(record) for record in records],
    }
    quantized = 0 if export_dense else sum(f"{p.module}.qweight" in tensors for p in choice.places.values())
    if not export_dense:
        for key, where in list(choice.places.items()):
            if f"{where.module}.qweight" not in tensors:
                del choice.places[key]
                choice.skipped.append((key.removesuffix(".weight"), "not in a decoder block: no calibration"))
    convert = _converter(choice, tensors, names, keys)
    return Calibrated(convert, quantized, tuple(records), meta, notes, state.remove)


def _converter(choice: Choice, tensors: Tensors, names: Names, keys: Sequence[str]) -> Convert:
    """Each tensor of the dense checkpoint to what the search made of it; None where it stays as it was."""
    extra = _activation_scales(choice, tensors, names, keys)

    def convert(key: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor] | None:
        name = key.removesuffix(".weight")
        place = choice.places.get(key)
        module = place.module if place is not None else names.target(key)[0].removesuffix(".weight")
        if f"{module}.qweight" in tensors:
            found = {f"{name}.{s}": tensors.get(f"{module}.{s}") for s in SUFFIXES if f"{module}.{s}" in tensors}
            if key in extra:
                scales, value = extra[key]
                found[scales] = tensors.get(value)
            return found
        target = f"{module}.weight" if place is not None else names.target(key)[0]
        if target not in tensors and f"{names.prefix}.{target}" in tensors:
            target = f"{names.prefix}.{target}"
        if target in tensors:
            return {key: tensors.get(target)}
        return None

    return convert


def _activation_scales(
    choice: Choice, tensors: Tensors, names: Names, keys: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """For a linear beside a scaled activation: the checkpoint's name of the scales, and theirs in ``tensors``."""
    found = {}
    known = {place.module for place in choice.places.values()}
    for value in tensors.places:
        owner, _, suffix = value.rpartition(".")
        if suffix != "scales" or owner in known:
            continue
        parent, _, leaf = owner.rpartition(".")
        for key, place in choice.places.items():
            if place.module.rpartition(".")[0] == parent:
                found[key] = (f"{key.removesuffix('.weight').rpartition('.')[0]}.{leaf}.scales", value)
                break
    return found


def _load(source: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map=None)
    except AwqError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{source} cannot be loaded by transformers: {first_line(error)}") from error
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds NaN or inf, which has no code: the model is damaged")
    return model


def _tokenizer(source: Path) -> tuple[Callable[[str], Sequence[int]], list[int]]:
    """Text to ids without special tokens, and the beginning-of-text token where this tokenizer writes one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{source} has no tokenizer that transformers can load, which the calibration text needs: "
            "put it there, or use --method rtn"
        ) from error
    first = tokenizer("a").input_ids[:1]
    prefix = first if first and first[0] == tokenizer.bos_token_id else []

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    return encode, list(prefix)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # which meta cannot
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise ConfigError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def _fingerprint(source: Path) -> str:
    """Of a model folder: names, sizes and times of its files."""
    whole = hashlib.sha256()
    for file in sorted(source.iterdir()):
        if file.is_file():
            found = file.stat()
            whole.update(f"{file.name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return whole.hexdigest()


def _losses(record: Mapping[str, Any]) -> float | None:
    """The share of a block's linear outputs that rounding changes, by energy."""
    signal = sum(group.get("signal", 0.0) for group in record["groups"])
    return round(sum(group.get("loss", 0.0) for group in record["groups"]) / signal, 7) if signal else None
