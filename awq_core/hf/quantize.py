"""``quantize()``: a dense model folder in, an AWQ checkpoint folder out, one tensor at a time.

This first form rounds to nearest; it needs no calibration text and never holds the whole model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .._version import __version__
from ..checkpoint import TensorHeader, check_finite, checkpoint_files, read_headers
from ..errors import CheckpointError, ConfigError, LayoutError
from ..layouts import Layout, checkpoint_layout
from ..layouts.nibbles import PER_WORD
from ..quantization.rtn import quantize_weight
from ..quantization.write import ShardWriter, copy_side_files, new_folder, write_json
from .skeleton import Names, is_experts

VERSIONS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast"}
DTYPES = ("float16", "bfloat16")
OUTPUT = "output embedding"  # which no loader of AWQ takes for quantized, so that it need not be listed

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did: counts, bytes of the weights before and after, and what was left dense, and why."""

    out: Path
    quantized: int
    dense: int
    bytes_before: int
    bytes_after: int
    seconds: float
    skipped: tuple[tuple[str, str], ...]


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    group_size: int = 128,
    zero_point: bool = True,
    layout: str = "gemm",
    dtype: str = "float16",
    modules_to_not_convert: Sequence[str] = (),
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize the folder ``model`` to 4 bits, round to nearest, and write the AWQ checkpoint ``out``.

    Every linear of the model is quantized but the output embedding and those whose name contains a word of
    ``modules_to_not_convert``. ``group_size`` -1 is one group a column. Dense tensors are stored in ``dtype``.
    ``progress(done, total, name)`` is called after each tensor.

    Raises:
        ConfigError: an option is wrong, or ``group_size`` does not divide a linear's K (it says which would).
        CheckpointError: ``model`` cannot be read, is quantized already, holds NaN or inf; ``out`` cannot be written.
    """
    started = time.perf_counter()
    source = Path(model)
    kind = _checked_layout(layout, zero_point, dtype)
    if source.resolve().is_relative_to(Path(out).resolve()):
        raise CheckpointError(f"{out} is or holds the model {source} itself: choose another folder for the result")
    files = checkpoint_files(source)
    headers = read_headers(files)
    config = _dense_config(source)
    chosen, skipped = _choose(config, headers, modules_to_not_convert, group_size, kind, source)
    torch_dtype = getattr(torch, dtype)
    before = 0
    with new_folder(Path(out), overwrite) as folder:
        writer = ShardWriter(folder, max_shard_size)
        for done, (key, tensor) in enumerate(_tensors(files), start=1):
            before += tensor.numel() * tensor.element_size()
            if key in chosen:
                _write_quantized(writer, key, tensor, chosen[key], kind, zero_point)
            else:
                writer.add(key, _cast(key, tensor, torch_dtype))
            if progress is not None:
                progress(done, len(headers), key)
        writer.close()
        copy_side_files(source, folder)
        write_json(folder / "config.json", _quantized_config(source, group_size, zero_point, layout, dtype, skipped))
    return QuantizeReport(
        out=Path(out),
        quantized=len(chosen),
        dense=len(headers) - len(chosen),
        bytes_before=before,
        bytes_after=writer.total,
        seconds=time.perf_counter() - started,
        skipped=tuple(skipped),
    )


def _checked_layout(layout: str, zero_point: bool, dtype: str) -> Layout:
    if layout not in VERSIONS:
        raise ConfigError(f"layout {layout!r} cannot be written: choose {', '.join(VERSIONS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} cannot be written: choose {' or '.join(DTYPES)}")
    if not zero_point and layout != "gemm":
        raise ConfigError(f"layout {layout} stores zero points: zero_point=False needs layout gemm")
    return checkpoint_layout(layout)


def _dense_config(source: Path) -> Any:
    from transformers import AutoConfig

    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json: it is not a model folder")
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} is quantized already: quantize the dense model that it was made from")
    return config


def _choose(
    config: Any, headers: Any, skip: Sequence[str], group_size: int, layout: Layout, source: Path
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The checkpoint keys to quantize with their group size, and the linears that are left dense, with the reason."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = Names.of(model)
    output = model.get_output_embeddings()
    chosen: dict[str, int] = {}
    skipped: list[tuple[str, str]] = []
    wrong: set[int] = set()
    for key, header in headers.items():
        target, joined = names.target(key)
        path = target.removesuffix(".weight")
        module = _submodule(model, path)
        linear = isinstance(module, nn.Linear) and not joined and target.endswith(".weight")
        if not linear and not (joined and is_experts(model, target.rpartition(".")[0]) and len(header.shape) == 2):
            continue
        name = key.removesuffix(".weight")
        if module is not None and module is output:
            skipped.append((name, OUTPUT))
        elif any(word in name for word in skip):
            skipped.append((name, "asked for"))
        else:
            n, k = header.shape
            group = k if group_size == -1 else group_size
            if layout.refuses(k, n, group) is not None:
                if n % PER_WORD:  # no group size helps, and such linears (a gate of one output) are small
                    skipped.append((name, f"its {n} outputs do not fill words of {PER_WORD} codes"))
                    continue
                wrong.add(k)
            chosen[key] = group
    if wrong:
        sizes = [g for g in (128, 64, 32, 16) if all(_fits(layout, headers[key], g) for key in chosen)]
        advice = f"take --group-size {sizes[0]}" if sizes else "leave these linears out with --skip"
        raise ConfigError(
            f"{source}: group_size {group_size} does not fit linears of {', '.join(map(str, sorted(wrong)))} inputs "
            f"in layout {layout.name}; {advice}"
        )
    if not chosen:
        raise CheckpointError(f"{source}: no linear to quantize was found")
    return chosen, skipped


def _fits(layout: Layout, header: TensorHeader, group_size: int) -> bool:
    n, k = header.shape
    return layout.refuses(k, n, group_size) is None


def _write_quantized(
    writer: ShardWriter, key: str, tensor: torch.Tensor, group: int, layout: Layout, zero_point: bool
) -> None:
    name = key.removesuffix(".weight")
    try:
        codes = quantize_weight(tensor, group, zero_point)
    except (CheckpointError, LayoutError) as error:
        raise type(error)(f"{name}: {error}") from None
    for suffix, packed in layout.pack(codes).items():
        writer.add(f"{name}.{suffix}", packed)


def _cast(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if key.endswith((".weight", ".bias")):  # other tensors, such as masks, may hold inf on purpose
        check_finite(key, tensor)
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise CheckpointError(f"{key} has values beyond float16's range: quantize with --dtype bfloat16")
    return cast


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    yield key, opened.get_tensor(key)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def _quantized_config(
    source: Path, group_size: int, zero_point: bool, layout: str, dtype: str, skipped: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text("utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    left_dense = sorted({name for name, why in skipped if why != OUTPUT})
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": zero_point,
        "version": VERSIONS[layout],
        "modules_to_not_convert": left_dense or None,
        "meta": {"made_by": f"awq-core {__version__}", "method": "round to nearest"},
    }
    return config


def _submodule(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
