"""One decoder block, dense in float32, becomes codes: moments, scales, ranges, rounding."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..layouts import Codes
from .call import Call
from .clip import search_ranges
from .correct import corrected
from .feedback import round_with_feedback
from .fold import Group, fold
from .grid import Grid, fit, ranges
from .moments import Moments, inputs_of
from .scales import Target, quadratic, search_scales
from .settings import Settings

QK = re.compile(r"(^|\.)(q|k|query|key|q_proj|k_proj|Wq|Wk)$")  # what the paper does not clip, by the usual names


@dataclass
class Hidden:
    """Hidden states [B, T, H] between blocks, a batch each, on the CPU.

    ``seen`` are those that the next block gets, ``dense`` those of the dense model where they are apart.
    """

    seen: list[torch.Tensor]
    dense: list[torch.Tensor] | None = None


@dataclass
class BlockResult:
    """``codes`` by linear, ``dense`` parameters that folding changed, losses and remarks; names are the block's own."""

    codes: dict[str, Codes] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    groups: Sequence[Group],
    group_sizes: Mapping[str, int],
    calls: Sequence[Call],
    hidden: Hidden,
    settings: Settings,
    dense_dtype: torch.dtype,
    export_dense: bool = False,
) -> BlockResult:
    """Quantize ``block`` in place (its weights become the rounded ones) and move ``hidden`` on to its outputs.

    ``group_sizes`` holds the resolved group size of each linear. Parameters that change but stay dense are rounded to
    ``dense_dtype``, as they will be stored. ``export_dense`` folds the scales and quantizes nothing.

    Raises:
        CheckpointError: the activations or a weight are not finite.
    """
    result = BlockResult()
    device = next(block.parameters()).device
    moments, outputs = _gather(block, groups, calls, hidden, settings)
    scaled = [_scale(block, group, group_sizes, moments, settings, result, export_dense) for group in groups]
    if not export_dense:  # after all folds: a later group's may scale the rows of an earlier group's linear
        for group, squares in zip(groups, scaled, strict=True):
            _round(block, group, group_sizes, squares, settings, result)
    for name in result.dense:
        stored = block.get_parameter(name)
        stored.copy_(stored.to(dense_dtype))
        result.dense[name] = stored.to(dense_dtype).cpu()
    if settings.propagate and not export_dense:
        hidden.dense = outputs
        hidden.seen = [
            call.to(device).run(block, x.to(device)).cpu() for call, x in zip(calls, hidden.seen, strict=True)
        ]
    else:
        hidden.seen = outputs
    return result


def _gather(
    block: nn.Module, groups: Sequence[Group], calls: Sequence[Call], hidden: Hidden, settings: Settings
) -> tuple[dict[str, Moments], list[torch.Tensor]]:
    """The moments of each input by the name of the first linear that reads it, and the dense block's outputs."""
    device = next(block.parameters()).device
    found: dict[str, Moments] = {}
    outputs: list[torch.Tensor] = []
    before = hidden.dense or hidden.seen
    with inputs_of(block, groups) as inputs:
        for number, call in enumerate(calls):
            there = call.to(device)
            outputs.append(there.run(block, before[number].to(device)).cpu())
            dense: dict[str, torch.Tensor] = {}
            if hidden.dense is not None:
                dense = dict(inputs) if settings.correct else {}
                inputs.clear()
                there.run(block, hidden.seen[number].to(device))
            for name, x in inputs.items():
                if name not in found:
                    found[name] = Moments(x.shape[1], device)
                found[name].add(x, dense.get(name))
            inputs.clear()
    for name, moments in found.items():
        if not bool(torch.isfinite(moments.square).all()):
            raise CheckpointError(f"the input of {name} is not finite on the calibration text: is the model damaged?")
    return found, outputs


def _scale(
    block: nn.Module,
    group: Group,
    group_sizes: Mapping[str, int],
    moments: Mapping[str, Moments],
    settings: Settings,
    result: BlockResult,
    export_dense: bool,
) -> dict[str, torch.Tensor]:
    """Fold the best scales of ``group`` into the block; the second moments of each linear's scaled input."""
    squares, magnitude = _of_group(block, group, moments, result)
    for names in group.inputs:
        own = moments.get(names[0])
        if own is None or own.drift is None or export_dense:
            continue
        for name in names:
            weight = _weight(block, name)
            weight.copy_(corrected(weight, own.square, own.drift, settings.correct, settings.correct_damping))
    entry: dict[str, Any] = {"linears": list(group.linears)}
    result.groups.append(entry)
    if not settings.scale_steps or group.before is None or (group.tied and not settings.tie_heads):
        return squares
    found = search_scales(
        [Target(_weight(block, name), squares[name]) for name in group.linears],
        magnitude,
        min(group_sizes[name] for name in group.linears),
        settings.zero_point,
        settings.scale_steps,
        settings.duo_scaling,
        group.tie,
        settings.coarse,
    )
    entry |= {"nearest": found.plain, "scaled": found.loss, "ratio": found.ratio}
    if found.ratio is None:
        return squares
    result.dense |= dict.fromkeys(fold(block, group, found.scales), torch.empty(0))
    outer = torch.outer(found.scales, found.scales)
    scaled: dict[str, torch.Tensor] = {}
    for names in group.inputs:
        scaled |= dict.fromkeys(names, squares[names[0]] / outer)
    return scaled


def _round(
    block: nn.Module,
    group: Group,
    group_sizes: Mapping[str, int],
    squares: Mapping[str, torch.Tensor],
    settings: Settings,
    result: BlockResult,
) -> None:
    loss = signal = 0.0
    for names in _alike(group, group_sizes):
        square, size = squares[names[0]], group_sizes[names[0]]
        grids = [_grid(_weight(block, name), square, size, settings, name) for name in names]
        weight = torch.cat([_weight(block, name) for name in names])
        grid = Grid(torch.cat([g.scales for g in grids]), torch.cat([g.zeros for g in grids]))
        if settings.feedback:
            rounded = round_with_feedback(weight, square, grid, size, settings.damping)
        else:
            rounded = grid.round(weight)
        loss += quadratic(rounded - weight, square)
        signal += quadratic(weight, square)
        parts = torch.split(rounded, [len(g.scales) for g in grids])
        for name, own, part in zip(names, grids, parts, strict=True):
            _weight(block, name).copy_(part)
            result.codes[name] = own.codes(part, torch.float16)
            result.dense.pop(f"{name}.weight", None)
    entry = next(entry for entry in result.groups if entry["linears"] == list(group.linears))
    entry |= {"loss": loss, "signal": signal}


def _alike(group: Group, group_sizes: Mapping[str, int]) -> list[list[str]]:
    """The linears of ``group`` that are rounded in one go: those with the same input and the same group size."""
    found: dict[tuple[int, int], list[str]] = {}
    for number, names in enumerate(group.inputs):
        for name in names:
            found.setdefault((number, group_sizes[name]), []).append(name)
    return list(found.values())


def _grid(weight: torch.Tensor, square: torch.Tensor, size: int, settings: Settings, name: str) -> Grid:
    if settings.clip and (settings.clip_qk or not QK.search(name)):
        return search_ranges(weight, square, size, settings.zero_point)
    return fit(*ranges(weight, size), settings.zero_point)


def _of_group(
    block: nn.Module, group: Group, moments: Mapping[str, Moments], result: BlockResult
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Second moments of each linear's input, and the mean magnitude over all; unused experts get the others' mean."""
    known = [moments[names[0]] for names in group.inputs if names[0] in moments]
    first = _weight(block, group.linears[0])
    if known:
        count = sum(m.count for m in known)
        spare = torch.stack([m.square for m in known]).sum(0) / count if len(known) < len(group.inputs) else None
        magnitude = torch.stack([m.magnitude for m in known]).sum(0) / count
    else:
        spare = torch.eye(first.shape[1], device=first.device)
        magnitude = torch.ones(first.shape[1], device=first.device)
    squares: dict[str, torch.Tensor] = {}
    for names in group.inputs:
        own = moments.get(names[0])
        if own is None:
            result.notes.append(f"{', '.join(names)}: no calibration token was sent there; the others' stand in")
            assert spare is not None
        elif own.dead:
            result.notes.append(f"{', '.join(names)}: {own.dead} input channels are zero on all calibration tokens")
        squares |= dict.fromkeys(names, spare if own is None else own.mean_square)  # type: ignore[arg-type]
    return squares, magnitude


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    return block.get_parameter(f"{name}.weight")
