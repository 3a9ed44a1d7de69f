"""``modules_to_fuse`` as the user wrote it, to a mapping by paths; and its sizes, held against the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from awq_core.api import FusingMapping
from awq_core.errors import ConfigError
from awq_core.linear import AwqLinear
from awq_core.options import FusingMap

from .plan import decoder_of, find, layers_of

ASKED = "modules_to_fuse"


def resolve(model: nn.Module, asked: FusingMap, known: FusingMapping | None) -> tuple[FusingMapping, tuple[str, ...]]:
    """Paths for the names that the user gave, and sentences to tell.

    A name may be a path inside a layer (``self_attn.q_proj``). The names of one block must be found together in one
    module of a layer of the decoder.

    Raises:
        ConfigError: names what is missing and what is there, or the size that differs.
    """
    path, decoder = decoder_of(model)
    layers = known.layers if known is not None else _longest_list(decoder)
    model_type = str(getattr(getattr(decoder, "config", None), "model_type", "") or "unknown")
    found = FusingMapping((model_type,), (), (), layers)
    stack = list(layers_of(decoder, path, found))
    attention, mlp = (
        _paths(stack, kind, names) for kind, names in (("attention", asked.attention), ("mlp", asked.mlp))
    )
    mapping = FusingMapping((model_type,), attention, mlp, layers)
    _check_config(asked, getattr(decoder, "config", None), type(decoder).__name__)
    if attention:
        for name, layer in stack:
            _check_shapes(asked, name, [find(layer, part) for part in attention], attention)
    return mapping, _norm_notes(decoder, stack, asked.layernorm)


def _paths(stack: Sequence[tuple[str, nn.Module]], kind: str, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    parents: dict[str, list[str]] = {}  # inside a layer: where in the model
    best: tuple[int, str, nn.Module] | None = None
    for layer_name, layer in stack:
        for inside, module in layer.named_modules():
            there = sum(find(module, name) is not None for name in names)
            where = f"{layer_name}.{inside}" if inside else layer_name
            if there == len(names):
                parents.setdefault(inside, []).append(where)
            elif there and (best is None or there > best[0]):
                best = (there, where, module)
    if len(parents) == 1:
        inside = next(iter(parents))
        return tuple(f"{inside}.{name}" if inside else name for name in names)
    if parents:
        places = " and ".join(sorted(where[0] for where in parents.values()))
        raise ConfigError(
            f"{ASKED}[{kind!r}] is found in more than one place, {places}: write the path inside the layer, "
            f"like {sorted(parents)[0]}.{names[0]}"
        )
    if best is None:
        name, layer = stack[0] if stack else ("the decoder", nn.Module())
        raise ConfigError(
            f"{ASKED}[{kind!r}] names {', '.join(names)}, but no module of {name} has any of them; its linears are "
            f"{_some(path for path, module in layer.named_modules() if _is_linear(module))}"
        )
    _, where, module = best
    lost = ", ".join(repr(name) for name in names if find(module, name) is None)
    raise ConfigError(
        f"{ASKED}[{kind!r}] names {lost}, which {where} does not have; it has "
        f"{_some(name for name, _ in module.named_children())}"
    )


def _check_config(asked: FusingMap, config: Any, kind: str) -> None:
    for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"):
        own = getattr(config, name, None)
        if isinstance(own, int) and own != getattr(asked, name):
            raise ConfigError(f"{ASKED} says {name} {getattr(asked, name)}, but {kind} has {own}")
    alibi = _uses_alibi(config)
    if alibi is not None and alibi != asked.use_alibi:
        has = "ALiBi" if alibi else "rotary position embeddings, not ALiBi"
        raise ConfigError(f"{ASKED} says use_alibi {asked.use_alibi}, but {kind} has {has}")


def _uses_alibi(config: Any) -> bool | None:
    """Whether the model has ALiBi, as far as its config says."""
    for holder in (getattr(config, "attn_config", None), config):
        alibi = getattr(holder, "alibi", None)
        if isinstance(alibi, bool):
            return alibi
    if getattr(config, "model_type", None) == "bloom":
        return True
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    return False if rope else None


def _check_shapes(asked: FusingMap, name: str, parts: Sequence[nn.Module | None], paths: Sequence[str]) -> None:
    """ConfigError where a projection's shape is not that of so many heads."""
    sizes = [(part.in_features, part.out_features) if isinstance(part, AwqLinear) else None for part in parts]
    heads, groups = asked.num_attention_heads, asked.num_key_value_heads
    if sizes[0] is not None and sizes[0][0] != asked.hidden_size:
        raise ConfigError(
            f"{ASKED} says hidden_size {asked.hidden_size}, but {name}.{paths[0]} takes {sizes[0][0]} inputs"
        )
    counts = (heads, groups, groups) if len(parts) == 4 else (heads + 2 * groups,)
    wide = set()
    for path, size, count in zip(paths, sizes, counts, strict=False):
        if size is None:
            continue
        if size[1] % count:
            raise ConfigError(
                f"{ASKED} says {heads} heads and {groups} key-value heads, but the {size[1]} outputs of {name}.{path} "
                f"are no multiple of {count}"
            )
        wide.add(size[1] // count)
    if len(wide) > 1:
        raise ConfigError(
            f"{ASKED} says {heads} heads and {groups} key-value heads, which in the projections of {name} would be "
            f"{' and '.join(map(str, sorted(wide)))} wide: one of the two numbers is wrong"
        )


def _norm_notes(decoder: nn.Module, stack: Sequence[tuple[str, nn.Module]], names: Sequence[str]) -> tuple[str, ...]:
    """Norms are never replaced by their names, so a name that matches nothing changes nothing: it is told."""
    here = {path.rpartition(".")[2] for path, _ in decoder.named_modules()}
    lost = [name for name in names if name.rpartition(".")[2] not in here]
    if not lost:
        return ()
    own = [
        name
        for name, module in [*decoder.named_children(), *(stack[0][1].named_children() if stack else ())]
        if "norm" in type(module).__name__.lower()
    ]
    return (
        f"{ASKED}['layernorm'] names {', '.join(lost)}, which {type(decoder).__name__} does not have (its norms are "
        f"{', '.join(own) or 'called otherwise'}): the model's own norms are used, whatever they are called",
    )


def _longest_list(decoder: nn.Module) -> str:
    lists = [(len(module), name) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(decoder).__name__} has no list of layers in which modules could be fused")
    return str(max(lists, key=lambda item: (item[0], -len(item[1])))[1])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | AwqLinear)


def _some(names: Any) -> str:
    return ", ".join(names) or "none"
