"""Which tensors of a dense checkpoint become quantized linears, and where in the model each of them goes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint import TensorHeader
from ..errors import CheckpointError, ConfigError
from ..layouts import Layout
from ..layouts.nibbles import PER_WORD
from .skeleton import Names, is_experts

OUTPUT = "output embedding"  # which no loader of AWQ takes for quantized, so that it need not be listed
STANDARD = (128, 64, 32, 16)
PARTS = ("gate_proj", "up_proj")  # of a stacked gate_up_proj, in this order


@dataclass(frozen=True)
class Place:
    """A linear of the checkpoint: its module in the model (an expert's as ``unstack`` names it) and its group size."""

    module: str
    group_size: int


@dataclass
class Choice:
    """``places`` by checkpoint key, the ``group_size`` of the config, and linears left dense with the reason."""

    group_size: int
    places: dict[str, Place] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(
    model: Any,
    headers: Mapping[str, TensorHeader],
    skip: Sequence[str],
    group_size: int | None,
    layout: Layout,
    source: Path,
) -> Choice:
    """Every linear but the output embedding and those whose name contains a word of ``skip``.

    ``group_size`` None takes the largest usual one that fits all; linears that a given one does not fit stay dense.

    Raises:
        ConfigError: ``group_size`` fits less than half of the weights (it says which would).
        CheckpointError: there is no linear.
    """
    found, skipped, excluded = _candidates(model, headers, skip)
    if not found:
        raise CheckpointError(f"{source}: no linear to quantize was found")
    fitting = [g for g in STANDARD if all(_fits(layout, headers[key], g) for key in found)]
    notes = []
    if group_size is None:
        covered = {g: _weights(headers, [k for k in found if _fits(layout, headers[k], g)]) for g in STANDARD}
        group_size = fitting[0] if fitting else max(STANDARD, key=lambda g: covered[g])
        if group_size != STANDARD[0]:
            notes.append(f"group size {group_size}, since {STANDARD[0]} does not divide the inputs of all linears")
    misfits = {key for key in found if not _fits(layout, headers[key], group_size)}
    # A block's experts are stacked when they are loaded: all of them are quantized, or none.
    wrong = misfits | _in_stacks(found, (found[key] for key in misfits))
    if 2 * _weights(headers, wrong) > _weights(headers, found):
        sizes = ", ".join(map(str, sorted({headers[key].shape[1] for key in wrong})))
        advice = f"take --group-size {fitting[0]}" if fitting else "leave these linears out with --skip"
        raise ConfigError(
            f"{source}: group_size {group_size} does not fit linears of {sizes} inputs in layout {layout.name}; "
            f"{advice}"
        )
    choice = Choice(group_size, skipped=skipped, notes=notes)
    wrong |= _in_stacks(found, excluded)
    for key, module in found.items():
        k = headers[key].shape[1]
        if key in wrong:
            why = f"group size {group_size} does not fit its {k} inputs"
            choice.skipped.append((key.removesuffix(".weight"), why if key in misfits else "other experts stay dense"))
        else:
            choice.places[key] = Place(module, k if group_size == -1 else group_size)
    if not choice.places:
        raise CheckpointError(f"{source}: no linear to quantize was found")
    return choice


def _candidates(
    model: Any, headers: Mapping[str, TensorHeader], skip: Sequence[str]
) -> tuple[dict[str, str], list[tuple[str, str]], list[str]]:
    """Modules by key; what is left dense, with the reason; the modules of those that are left dense."""
    names = Names.of(model)
    output = model.get_output_embeddings()
    found: dict[str, str] = {}
    skipped: list[tuple[str, str]] = []
    excluded: list[str] = []
    for key, header in headers.items():
        target, joined = names.target(key)
        path = target.removesuffix(".weight")
        module = _submodule(model, path)
        linear = isinstance(module, nn.Linear) and not joined and target.endswith(".weight")
        owner = target.rpartition(".")[0]
        if not linear and is_experts(model, owner) and len(header.shape) == 3:
            skipped.append((key.removesuffix(".weight"), "experts stored in one tensor cannot be written as AWQ yet"))
            continue
        name = key.removesuffix(".weight")
        if not linear and not (joined and is_experts(model, owner) and len(header.shape) == 2):
            if len(header.shape) == 2 and is_experts(model, f"{path.rpartition('.')[0]}.experts"):
                skipped.append((name, "router of the experts"))
            continue
        to = path if linear else _expert(names, key, target)
        n = header.shape[0]
        if module is not None and module is output:
            skipped.append((name, OUTPUT))
        elif any(word in name for word in skip):
            skipped.append((name, "asked for"))
        elif n % PER_WORD:  # no group size helps, and such linears (a gate of one output) are small
            skipped.append((name, f"its {n} outputs do not fill words of {PER_WORD} codes"))
        else:
            found[key] = to
            continue
        excluded.append(to)
    return found, skipped, excluded


def _expert(names: Names, key: str, target: str) -> str:
    """The unstacked name of one expert's weight: ``...experts.3.up_proj``."""
    owner, _, stack = target.rpartition(".")
    part = "down_proj" if stack == "down_proj" else PARTS[names.source(key)]
    numbers = re.findall(r"\.(\d+)\.", key)
    return f"{owner}.{numbers[-1]}.{part}"


def _in_stacks(found: Mapping[str, str], modules: Iterable[str]) -> set[str]:
    """The keys of all experts that are stacked with one of ``modules``."""
    stacks = {_stack(module) for module in modules} - {None}
    return {key for key, module in found.items() if _stack(module) in stacks}


def _stack(module: str) -> str | None:
    """The experts module that an expert's linear belongs to, or None for other linears."""
    found = re.fullmatch(r"(.*\.experts)\.\d+\.\w+", module)
    return found[1] if found else None


def _fits(layout: Layout, header: TensorHeader, group_size: int) -> bool:
    n, k = header.shape
    return layout.refuses(k, n, k if group_size == -1 else group_size) is None


def _weights(headers: Mapping[str, TensorHeader], keys: Iterable[str]) -> int:
    return sum(headers[key].shape[0] * headers[key].shape[1] for key in keys)


def _submodule(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
