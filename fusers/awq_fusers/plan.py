"""Which projections of a model can be joined: found by paths, checked, nothing changed yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from awq_core.api import FusingMapping
from awq_core.errors import ConfigError
from awq_core.linear import AwqLinear

from .joined import offloaded, refuses
from .record import Unfused

OFFLOADED = "its weights are offloaded, so they stay as they are stored"


@dataclass(frozen=True, eq=False)
class Block:
    """Projections of one attention or MLP: ``heads`` read its input (to be joined, or packed), ``last`` ends it.

    ``parent`` holds the heads, under ``names``; ``path`` is where it lies in the model.
    """

    path: str
    parent: nn.Module
    names: tuple[str, ...]
    last: nn.Module

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The modules to join, in order."""
        return {name: self.parent.get_submodule(name) for name in self.names}


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One decoder layer and what of it will be fused."""

    name: str
    layer: nn.Module
    attention: Block | None
    mlp: Block | None


def decoder_of(model: nn.Module) -> tuple[str, Any]:
    """Path and module of the stack that writes text: towers for images or sound are never looked at."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else model
    return next((path, module) for path, module in model.named_modules() if module is decoder)


def layers_of(decoder: nn.Module, path: str, mapping: FusingMapping) -> Iterator[tuple[str, nn.Module]]:
    """Each layer of the decoder at ``path`` of the model, with its path."""
    found = find(decoder, mapping.layers)
    if not isinstance(found, nn.ModuleList):
        raise ConfigError(
            f"{type(decoder).__name__} has no list of layers {mapping.layers!r}, which the fusing mapping of "
            f"{', '.join(mapping.model_types)} names"
        )
    start = f"{path}.{mapping.layers}" if path else mapping.layers
    for name, layer in found.named_children():
        yield f"{start}.{name}", layer


def make_plan(model: nn.Module, mapping: FusingMapping, strict: bool) -> tuple[list[LayerPlan], list[Unfused]]:
    """What will be fused in ``model``, layer by layer, and what will not, and why.

    Under ``strict`` (the user named the modules) ConfigError instead, but for offloaded modules.
    """
    path, decoder = decoder_of(model)
    plans: list[LayerPlan] = []
    unfused: list[Unfused] = []
    for name, layer in layers_of(decoder, path, mapping):
        found: list[Block | None] = []
        for paths in (mapping.attention, mapping.mlp):
            block = _block(name, layer, paths)
            reason = _reason(block) if isinstance(block, Block) else block
            where = block.path if isinstance(block, Block) else f"{name}.{paths[0].rpartition('.')[0]}" if paths else ""
            if reason is not None:
                if strict and reason != OFFLOADED:
                    raise ConfigError(f"modules_to_fuse: {where} cannot be fused: {reason}")
                unfused.append(Unfused(where, reason))
            found.append(block if isinstance(block, Block) and reason is None else None)
        plans.append(LayerPlan(name, layer, *found))
    return plans, unfused


def _block(name: str, layer: nn.Module, paths: tuple[str, ...]) -> Block | str | None:
    """The block with these projections; None where nothing was asked or the layer has none of them, else why not."""
    modules = {path: find(layer, path) for path in paths}
    there = {path: module for path, module in modules.items() if isinstance(module, nn.Module)}
    missing = [path for path in paths if path not in there]
    if missing:
        return f"it has no {', '.join(missing)}" if len(missing) < len(paths) else None
    if not paths:
        return None
    *heads, last = paths
    parents = {path.rpartition(".")[0] for path in heads}
    if len(parents) > 1:
        return f"{', '.join(heads)} are not in one module"
    inside = parents.pop()
    where = f"{name}.{inside}" if inside else name
    parent = layer.get_submodule(inside)
    return Block(where, parent, tuple(path.rpartition(".")[2] for path in heads), there[last])


def _reason(block: Block) -> str | None:
    heads = block.heads
    if len(heads) > 1:
        return refuses(heads) or (OFFLOADED if offloaded(heads) else None)
    (name, head), *_ = heads.items()
    return None if isinstance(head, AwqLinear) else f"{name} is not quantized"


def find(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, or None."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
