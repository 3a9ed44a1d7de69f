"""All variants over all cases: one model in memory at a time, each case measured after a warm-up."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError
from . import machine
from .floor import floor_from, weight_bytes
from .loops import Case
from .measure import Speed, first_answer_seconds, measure
from .sources import Source, Variant, dense_bytes, forget

Progress = Callable[[int, int, str], None]
HEADROOM = 1.15  # of a model's weights, for what a case needs beside them


@dataclass(frozen=True)
class Row:
    """One variant on one case: its speed, or why there is none, and the most that the memory's bandwidth allows."""

    variant: Variant
    case: Case
    speed: Speed | None
    floor: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Made:
    """A variant's model: seconds to build and to the first answer, its bytes, and how it decodes."""

    variant: Variant
    load_seconds: float
    first_answer_seconds: float
    memory: int
    note: str | None = None


@dataclass(frozen=True)
class Report:
    """What a run measured, and on what."""

    source: str
    device: str
    dtype: str
    total_memory: int
    bandwidth: machine.Bandwidth
    rows: tuple[Row, ...] = ()
    made: tuple[Made, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    on_gpu: bool = False

    def of(self, variant: str) -> list[Row]:
        """The rows of one variant, in the order of the cases."""
        return [row for row in self.rows if row.variant == variant]

    def at(self, variant: str, case: Case) -> Row | None:
        """One row."""
        return next((row for row in self.of(variant) if row.case == case), None)


def run(
    source: Source,
    variants: Sequence[Variant],
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
    progress: Progress | None = None,
) -> Report:
    """Measure ``variants`` of ``source``; one for which there is no memory or no fuser is left out, with a note.

    Raises:
        ConfigError: a case is longer than the model's positions.
        CheckpointError, LayoutError, NoKernelError: the model cannot be made.
    """
    _check(source, cases)
    rows: list[Row] = []
    made: list[Made] = []
    notes: list[str] = []
    steps = len(variants) * (len(cases) + 1)

    def step(variant: Variant, done: int, what: str) -> None:
        if progress is not None:
            progress(variants.index(variant) * (len(cases) + 1) + done, steps, f"{variant}: {what}")

    bandwidth = machine.measure_bandwidth(device)
    forget(device)
    for variant in variants:
        refused = _refused(source, variant, device, dtype)
        if refused is not None:
            notes.append(refused)
            continue
        step(variant, 0, "making the model")
        found, info = _measure_variant(source, variant, cases, device, dtype, repeats, bandwidth.best, step)
        rows += found
        made += info
        forget(device)
    return Report(
        source.describe(),
        machine.describe(device),
        str(dtype).removeprefix("torch."),
        machine.total_memory(device),
        bandwidth,
        tuple(rows),
        tuple(made),
        tuple(notes),
        _versions(),
        device.type == "cuda",
    )


def _measure_variant(
    source: Source,
    variant: Variant,
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    bandwidth: float,
    step: Callable[[Variant, int, str], None],
) -> tuple[list[Row], list[Made]]:
    """All cases of one variant; a case that runs out of memory is a row with an error."""
    from ..hf.decode import why_not
    from ..hf.generation import memory

    began = time.perf_counter()
    try:
        model = source.make(variant, device, dtype, max(case.length for case in cases))
    except torch.OutOfMemoryError:
        return [Row(variant, case, None, error="out of memory") for case in cases], []
    machine.wait(device)
    load_seconds = time.perf_counter() - began
    reason = why_not(model) if variant == "fused" else None
    note = None if reason is None else f"the fused model has no fast decode step: {reason}"
    rows: list[Row] = []
    first: float | None = None
    for number, case in enumerate(cases):
        step(variant, number + 1, str(case))
        floor = floor_from(
            weight_bytes(model, case.batch_size), model, case.batch_size, case.prefill + case.decode / 2, bandwidth
        )
        try:
            if first is None:
                first = first_answer_seconds(model, case)
            rows.append(Row(variant, case, measure(model, case, repeats), floor))
        except torch.OutOfMemoryError:
            rows.append(Row(variant, case, None, floor, "out of memory"))
            forget(device)
    return rows, [Made(variant, load_seconds, first or float("nan"), memory(model)[0], note)]


def _check(source: Source, cases: Sequence[Case]) -> None:
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    for case in cases:
        if longest is not None and case.length > longest:
            raise ConfigError(f"{case} makes {case.length} tokens, and the model has {longest} positions: take less")


def _refused(source: Source, variant: Variant, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a variant is left out, or None."""
    if variant == "fused" and importlib.util.find_spec("awq_fusers") is None:
        return "no fuser is installed: the fused rows are left out"
    if variant == "dense":
        wanted, free = dense_bytes(source.config, dtype) * HEADROOM, machine.free_memory(device)
        if wanted > free:
            return f"the dense model is left out: it wants {wanted / 2**30:.1f} GB and {free / 2**30:.1f} GB are free"
    return None


def _versions() -> dict[str, str]:
    import importlib.metadata as metadata

    from .._version import __version__

    found: dict[str, Any] = {"awq-core": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {name: str(version) for name, version in found.items() if version}
