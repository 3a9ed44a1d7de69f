"""``fuse`` and ``unfuse``: joining the projections of a loaded model, and putting them back."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from awq_core import plugins
from awq_core.api import FusingMapping
from awq_core.errors import ConfigError
from awq_core.linear import AwqLinear
from awq_core.notice import tell
from awq_core.options import FusingMap

from .asked import resolve
from .joined import JoinedLinear, JoinedPart
from .mapping import MAPPINGS
from .plan import Block, LayerPlan, decoder_of, find, layers_of, make_plan
from .record import FusedLayer, FusedRecord, Unfused

QKV = "qkv_joined"
GATE_UP = "gate_up_joined"

Wanted = FusingMapping | FusingMap | Mapping[str, Any] | None


def fuse(model: nn.Module, mapping: Wanted = None, max_seq_len: int | None = None) -> FusedRecord:
    """Join q+k+v and gate+up of an AWQ model that is loaded, in place; answers stay the same.

    Args:
        model: a transformers model with AwqLinears.
        mapping: None takes the mapping of the model's architecture; or what ``modules_to_fuse`` takes, or a mapping.
        max_seq_len: longest sequence that ``generate`` will be asked for; None sets no limit.

    Returns:
        The record, also at ``model.awq_fused``. ``model.unfuse()`` restores the model.

    Raises:
        ConfigError: the architecture is unknown, the mapping is wrong, or the model is fused already.
    """
    from awq_core.hf import fusing

    record = join(model, mapping, max_seq_len)
    fusing.install(model, record)
    return record


def unfuse(model: nn.Module) -> None:
    """Put the model's own projections back, bit for bit, and its own ``generate``; does nothing where none is fused."""
    from awq_core.hf import fusing

    if getattr(model, "awq_fused", None) is None:
        return
    fusing.uninstall(model)
    for parent in list(model.modules()):
        for name, joined in [(n, m) for n, m in parent.named_children() if isinstance(m, JoinedLinear)]:
            delattr(parent, name)
            parts = joined.split()
            for path, child in list(parent.named_modules(remove_duplicate=False)):  # an adapter may hold one twice
                if isinstance(child, JoinedPart) and child.joined is joined:
                    parent.set_submodule(path, parts[child.index])
    for name in ("awq_fused", "unfuse"):
        model.__dict__.pop(name, None)


def join(model: nn.Module, mapping: Wanted = None, max_seq_len: int | None = None) -> FusedRecord:
    """``fuse`` without the wrapper around ``generate``. What is joined of unbound parts is unbound too."""
    if getattr(model, "awq_fused", None) is not None:
        raise ConfigError("this model is fused already: call model.unfuse() first to fuse it in another way")
    model_type, plans, unfused, notes = look(model, mapping)
    _tell(unfused)
    for note in notes:
        tell(note)
    layers = tuple(_fuse_layer(plan) for plan in plans)
    record = FusedRecord(model_type, layers, max_seq_len, tuple(unfused), notes)
    model.__dict__["awq_fused"] = record
    model.__dict__["unfuse"] = functools.partial(unfuse, model)
    return record


def look(model: nn.Module, mapping: Wanted = None) -> tuple[str, list[LayerPlan], list[Unfused], tuple[str, ...]]:
    """Model type, what would be fused, what would not, and notes; nothing is changed. Raises what ``fuse`` raises."""
    _, decoder = decoder_of(model)
    model_type = str(getattr(getattr(decoder, "config", None), "model_type", "") or "unknown")
    known = known_mappings().get(model_type)
    notes: tuple[str, ...] = ()
    strict = mapping is not None
    if isinstance(mapping, Mapping):
        mapping = FusingMap.of(mapping)
    if isinstance(mapping, FusingMap):
        mapping, notes = resolve(model, mapping, known)
    elif mapping is None:
        mapping = known or _usual(model, model_type)
    plans, unfused = make_plan(model, mapping, strict)
    return model_type, plans, unfused, notes


def known_mappings() -> dict[str, FusingMapping]:
    """The mapping of each model type: our own, and those of installed plugins."""
    offered = [*plugins.registry().fusers, *MAPPINGS]
    return {model_type: mapping for mapping in offered for model_type in mapping.model_types}


def _usual(model: nn.Module, model_type: str) -> FusingMapping:
    """For an architecture that nobody knows: the usual names, where its layers have them (the readers need no more)."""
    usual = FusingMapping((model_type,))
    path, decoder = decoder_of(model)
    if find(decoder, usual.layers) is not None:
        stack = list(layers_of(decoder, path, usual))
        if stack and all(find(layer, name) is not None for _, layer in stack for name in usual.attention):
            return usual
    raise ConfigError(
        f"AwqConfig: do_fuse=True has no fusing mapping for model type {model_type!r}: pass modules_to_fuse, "
        f"or install a plugin that has one; known are {', '.join(sorted(known_mappings()))}"
    )


def _fuse_layer(plan: LayerPlan) -> FusedLayer:
    fields: dict[str, Any] = {}
    if plan.attention is not None:
        joined, sizes = _join_block(plan.attention, QKV)
        fields |= {
            "attention": plan.attention.parent,
            "qkv": joined,
            "qkv_names": plan.attention.names,
            "qkv_sizes": sizes,
            "o": plan.attention.last,
        }
    if plan.mlp is not None:
        joined, sizes = _join_block(plan.mlp, GATE_UP)
        fields |= {
            "mlp": plan.mlp.parent,
            "gate_up": joined,
            "gate_up_names": plan.mlp.names,
            "gate_up_sizes": sizes,
            "down": plan.mlp.last,
        }
    return FusedLayer(plan.name, plan.layer, **fields)


def _join_block(block: Block, name: str) -> tuple[AwqLinear, tuple[int, ...]]:
    heads: list[Any] = list(block.heads.values())
    if len(heads) == 1:
        return heads[0], (heads[0].out_features,)
    joined = JoinedLinear(heads)
    for index, child in enumerate(block.names):
        setattr(block.parent, child, JoinedPart(joined, index))
    setattr(block.parent, name, joined)  # behind its readers: see JoinedLinear._load_from_state_dict
    return joined, joined.sizes


def _tell(unfused: list[Unfused]) -> None:
    """A sentence for each reason, not for each block."""
    places: dict[str, list[str]] = defaultdict(list)
    for block in unfused:
        places[block.reason].append(block.path)
    for reason, paths in places.items():
        count = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        tell(f"{paths[0]}{count} stays unfused: {reason}")
