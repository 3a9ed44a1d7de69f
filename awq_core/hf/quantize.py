"""``quantize()``: a dense model folder in, an AWQ checkpoint folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils.logging import disable_progress_bar as disable_progress_bar

from .._version import __version__
from ..checkpoint import checkpoint_files, read_headers
from ..errors import CheckpointError, ConfigError, LayoutError, first_line
from ..layouts import Layout, checkpoint_layout
from ..quantization.rtn import quantize_weight
from ..quantization.settings import Settings
from ..quantization.state import GO_ON
from ..quantization.write import EXISTS, ShardWriter, copy_side_files, new_folder, write_json
from .choose import Choice, choose
from .export import new_config, rewrite
from .skeleton import Names

VERSIONS = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast"}
DTYPES = ("float16", "bfloat16")
METHODS = ("awq", "rtn")
REPORT = "awq_report.json"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class QuantizeReport:
    """What a run did: counts, bytes of the weights before and after, what was left dense and why, losses by block."""

    out: Path
    quantized: int
    dense: int
    bytes_before: int
    bytes_after: int
    seconds: float
    skipped: tuple[tuple[str, str], ...]
    method: str = "rtn"
    group_size: int = 128
    notes: tuple[str, ...] = ()
    blocks: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: Literal["awq", "rtn"] = "awq",
    group_size: int | None = None,
    zero_point: bool = True,
    layout: str = "gemm",
    dtype: str = "float16",
    modules_to_not_convert: Sequence[str] = (),
    calib: str | Path | None = None,
    calib_samples: int = 32,
    calib_length: int = 512,
    device: str = "cpu",
    resume: bool = False,
    export_dense: bool = False,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
    **search: Any,
) -> QuantizeReport:
    """Quantize the folder ``model`` to 4 bits and write the AWQ checkpoint ``out``.

    Every linear of the model is quantized but the output embedding and those whose name contains a word of
    ``modules_to_not_convert``. ``group_size`` -1 is one group a column; None takes 128, or the largest of 64, 32, 16
    that fits every linear. Dense tensors are stored in ``dtype``.

    ``method`` ``awq`` searches scales and ranges block by block on ``calib_samples`` windows of ``calib_length`` tokens
    of the text ``calib`` (a file or folder; None: a small text that travels with awq-core), running the blocks one at a
    time on ``device``. A run that was killed goes on at the block where it was with ``resume``, to the same result.
    ``search`` are fields of ``awq_core.quantization.settings.Settings``. ``export_dense`` writes the model dense, with
    the scales folded in, for other quantizers. ``rtn`` rounds to nearest, in seconds, without any text.
    ``progress(done, total, what)`` is called after each block, and for each tensor that is written.

    Raises:
        ConfigError: an option is wrong, ``group_size`` fits less than half of the weights, too little text.
        CheckpointError: ``model`` cannot be read, is quantized already, holds NaN or inf; ``out`` cannot be written.
    """
    started = time.perf_counter()
    source = Path(model)
    kind = _checked(method, layout, zero_point, dtype, export_dense)
    if method == "rtn" and search:
        raise ConfigError(f"method rtn has no option {sorted(search)[0]!r}")
    settings = Settings.of({**search, "zero_point": zero_point})
    if source.resolve().is_relative_to(Path(out).resolve()):
        raise CheckpointError(f"{out} is or holds the model {source} itself: choose another folder for the result")
    files = checkpoint_files(source)
    headers = read_headers(files)
    skeleton = _skeleton(source)
    choice = choose(skeleton, headers, modules_to_not_convert, group_size, kind, source)
    _check_out(Path(out), overwrite)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    meta: dict[str, Any] = {"made_by": f"awq-core {__version__}", "method": "round to nearest"}
    blocks: tuple[Mapping[str, Any], ...] = ()
    finish: Callable[[], None] = _nothing
    notes = list(choice.notes)
    left = "nothing is left of the attempt"
    if method == "awq":
        from .calibrated import calibrate

        found = calibrate(
            source,
            Path(out),
            choice,
            settings,
            kind,
            torch_dtype,
            calib=None if calib is None else Path(calib),
            samples=calib_samples,
            length=calib_length,
            device=device,
            resume=resume,
            export_dense=export_dense,
            progress=progress,
            names=Names.of(skeleton),
            keys=list(headers),
        )
        convert, blocks, finish = found.convert, found.blocks, found.finish
        meta |= found.meta
        notes += found.notes
        quantized = found.quantized
        left = f"the calibrated blocks are kept, {GO_ON}"
    else:
        convert, quantized = _nearest(choice, kind, zero_point), len(choice.places)

    def each(done: int, key: str) -> None:
        if progress is not None:
            progress(done, len(headers), key)

    with new_folder(Path(out), overwrite, left) as folder:
        writer = ShardWriter(folder, max_shard_size)
        before = rewrite(files, writer, convert, torch_dtype, each)
        copy_side_files(source, folder)
        config = new_config(source, None if export_dense else choice, zero_point, VERSIONS[layout], dtype, meta)
        write_json(folder / "config.json", config)
        report = QuantizeReport(
            out=Path(out),
            quantized=quantized,
            dense=len(headers) - quantized,
            bytes_before=before,
            bytes_after=writer.total,
            seconds=time.perf_counter() - started,
            skipped=tuple(choice.skipped),
            method=method,
            group_size=choice.group_size,
            notes=tuple(notes),
            blocks=blocks,
        )
        if method == "awq":
            write_json(folder / REPORT, report_data(report) | {"meta": meta})
    finish()
    return report


def report_data(report: QuantizeReport) -> dict[str, Any]:
    """The report as plain data."""
    return {**vars(report), "out": str(report.out), "blocks": [dict(block) for block in report.blocks]}


def _checked(method: str, layout: str, zero_point: bool, dtype: str, export_dense: bool) -> Layout:
    if method not in METHODS:
        raise ConfigError(f"method {method!r} does not exist: choose {' or '.join(METHODS)}")
    if layout not in VERSIONS:
        raise ConfigError(f"layout {layout!r} cannot be written: choose {', '.join(VERSIONS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} cannot be written: choose {' or '.join(DTYPES)}")
    if not zero_point and layout != "gemm":
        raise ConfigError(f"layout {layout} stores zero points: zero_point=False needs layout gemm")
    if export_dense and method != "awq":
        raise ConfigError("export_dense writes the scales of the search: it needs method awq")
    return checkpoint_layout(layout)


def _skeleton(source: Path) -> Any:
    """The dense model on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json: it is not a model folder")
    try:
        config = AutoConfig.from_pretrained(source)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{source} has no config.json that transformers can load: {first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} is quantized already: quantize the dense model that it was made from")
    kind = f"{source} is a {config.model_type} model"
    if config.is_encoder_decoder:
        raise CheckpointError(f"{kind}, which has an encoder too: only decoder-only language models can be quantized")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:  # transformers' own sentence lists all architectures that it has
        raise CheckpointError(f"{kind}, and transformers has no causal language model of that kind") from error
    if getattr(config, "is_decoder", None) is False and type(model).__name__ not in (config.architectures or ()):
        raise CheckpointError(
            f"{kind}, an encoder that reads in both directions: only decoder-only language models can be quantized"
        )
    return model


def _check_out(out: Path, overwrite: bool) -> None:
    """The same as the writer will say, but before the search; of what is there, only a model is replaced."""
    if overwrite and out.exists() and not (out / "config.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} is not a model's folder, so it is not replaced: choose another one for the result"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise CheckpointError(EXISTS.format(out))


def _nearest(choice: Choice, layout: Layout, zero_point: bool) -> Callable[[str, torch.Tensor], Any]:
    def convert(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor] | None:
        place = choice.places.get(key)
        if place is None:
            return None
        name = key.removesuffix(".weight")
        try:
            codes = quantize_weight(tensor, place.group_size, zero_point)
        except (CheckpointError, LayoutError) as error:
            raise type(error)(f"{name}: {error}") from None
        return {f"{name}.{suffix}": packed for suffix, packed in layout.pack(codes).items()}

    return convert


def _nothing() -> None:
    pass
