"""The AWQ search over a whole model: block by block, each finished one on disk before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import AwqError, CheckpointError, ConfigError
from ..layouts import Layout
from ..quantization.block import BlockResult, Hidden, quantize_block
from ..quantization.call import Call
from ..quantization.fold import Group
from ..quantization.settings import Settings
from ..quantization.state import State
from ..quantization.trace import trace
from ..quantization.unstack import unstack
from .choose import Choice
from .decoder import Decoder

# Architectures whose loaders (AutoAWQ's, transformers' and ours) give an activation scales of its own: the one thing
# that running a block cannot tell.
SCALED_ACTIVATIONS = {"bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2", "RefinedWebModel"}
BATCH = 4  # windows that run together: larger ones are no faster on a CPU, and cost memory

Step = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """All that the search needs beside the model."""

    choice: Choice
    settings: Settings
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    export_dense: bool = False


def search(model: Any, ids: torch.Tensor, job: Job, state: State, resume: bool, progress: Step | None) -> int:
    """Quantize every decoder block of ``model`` on the windows ``ids`` [S, T] into ``state``; returns their number.

    Blocks are run in float32 on ``job.device``, one at a time; the model stays where it is.

    Raises:
        CheckpointError: the model cannot be calibrated block by block, or its weights or activations are not finite.
    """
    with exact_matmuls():
        return _search(model, ids, job, state, resume, progress)


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Matmuls of float32 in float32, whatever the caller allows: TF32's error would hide whether a fold holds.

    torch has an older and a newer switch, and refuses to multiply where they contradict each other.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer one was turned, and the older one cannot say so
        older = "highest"
    try:
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _search(model: Any, ids: torch.Tensor, job: Job, state: State, resume: bool, progress: Step | None) -> int:
    decoder = Decoder.of(model)
    total = len(decoder.blocks)
    calls = decoder.calls(torch.split(ids, BATCH))
    tokens = ids.flatten()
    one, many = decoder.calls([tokens[:24].view(-1, 1)]), decoder.calls([tokens[:16].view(2, 8)])
    done = state.begin(resume)
    hidden = state.hidden(done - 1) if done else Hidden([call.hidden for call in calls[0]])
    if job.settings.propagate and not done and not job.export_dense:
        hidden.dense = list(hidden.seen)
    wanted = _by_block(job.choice, decoder.path)
    for number in range(done, total):
        started = time.perf_counter()
        block = decoder.block(number)
        path = f"{decoder.path}.{number}"
        try:
            strange = unstack(block)
            block = block.to(job.device)
            groups, notes = _groups(model, block, one[number][0], many[number][0], list(wanted.get(number, {})), job)
            result = quantize_block(
                block,
                groups,
                wanted.get(number, {}),
                calls[number],
                hidden,
                job.settings,
                job.dtype,
                job.export_dense,
            )
        except AwqError as error:
            raise type(error)(f"{path}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{path} does not fit into the free memory of {job.device}: free some, or leave --device out"
            ) from error
        result.notes += notes + [f"{name}: experts of a form that is left dense" for name in strange]
        record = {
            "block": path,
            "groups": result.groups,
            "notes": [f"{path}: {note}" for note in result.notes],
            "seconds": round(time.perf_counter() - started, 3),
        }
        state.save(number, _tensors(path, result, job.layout), record, hidden)
        decoder.blocks[number] = nn.Identity()  # its memory is free
        if progress is not None:
            progress(number + 1, total, f"{path}: {_loss(result)}")
    return total


def _groups(
    model: Any, block: nn.Module, one: Call, many: Call, wanted: Sequence[str], job: Job
) -> tuple[Sequence[Group], list[str]]:
    activations = model.config.model_type in SCALED_ACTIVATIONS and not job.export_dense
    traced = trace(block, one.to(job.device), many.to(job.device), wanted, activations)
    found = {name for group in traced.groups for name in group.linears}
    notes = [f"scales not folded: {note}" for note in traced.dropped]
    if unseen := sorted(set(wanted) - found):
        raise CheckpointError(
            f"{', '.join(unseen)} did not run in the block's forward, so there is nothing to calibrate on: "
            "leave them out with --skip"
        )
    return traced.groups, notes


def _by_block(choice: Choice, path: str) -> dict[int, dict[str, int]]:
    """Linears (by their name in the block) and their group sizes, by block."""
    found: dict[int, dict[str, int]] = {}
    for place in choice.places.values():
        if place.module.startswith(f"{path}."):
            number, _, name = place.module.removeprefix(f"{path}.").partition(".")
            found.setdefault(int(number), {})[name] = place.group_size
    return found


def _tensors(path: str, result: BlockResult, layout: Layout) -> dict[str, torch.Tensor]:
    """What is stored of a block: packed codes and changed dense tensors, by their names in the model."""
    found = {f"{path}.{name}": tensor for name, tensor in result.dense.items()}
    for name, codes in result.codes.items():
        found |= {f"{path}.{name}.{suffix}": packed.cpu() for suffix, packed in layout.pack(codes).items()}
    return found


def _loss(result: BlockResult) -> str:
    loss = sum(entry.get("loss", 0.0) for entry in result.groups)
    signal = sum(entry.get("signal", 0.0) for entry in result.groups)
    return f"error {100 * loss / signal:.2f} %" if signal else "scaled"
