"""From a checkpoint's header to a model whose linears, experts and activations are the quantized ones, on meta."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint import TensorHeader
from ..errors import CheckpointError, LayoutError
from ..experts import AwqExperts
from ..layouts.detect import Detected
from ..linear import AwqLinear
from . import _compat
from .scaled_activation import ScaledActivation

SHOWN = 8


@dataclass(frozen=True)
class Names:
    """The way from a checkpoint's names to the model's, as transformers will take it when it loads."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    state: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> Names:
        """Those of a model that still has its dense modules."""
        transforms = _compat.get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, _compat.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, _compat.WeightConverter)]
        return cls(renamings, converters, model.base_model_prefix, model.state_dict())

    def target(self, key: str) -> tuple[str, bool]:
        """The model's name of a checkpoint key, and whether it is a part that a converter joins with others."""
        name, pattern = _compat.rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        return name, pattern is not None

    def source(self, key: str) -> int:
        """Which of the parts that a converter joins the checkpoint key is: its place in the converter's list."""
        _, pattern = _compat.rename_source_key(key, self.renamings, self.converters, self.prefix, self.state)
        found: int = next(c.source_patterns.index(pattern) for c in self.converters if pattern in c.source_patterns)
        return found


def expected_shapes(model: nn.Module, headers: Mapping[str, TensorHeader]) -> dict[str, tuple[int, int]]:
    """(K, N) that the model wants of each quantized module of the checkpoint, where it has a linear for it."""
    names = Names.of(model)
    shapes: dict[str, tuple[int, int]] = {}
    for key in headers:
        name, _, suffix = key.rpartition(".")
        module = (
            _find(model, names.target(f"{name}.weight")[0].removesuffix(".weight")) if suffix == "qweight" else None
        )
        if isinstance(module, nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
    return shapes


def build(
    model: nn.Module,
    modules: Mapping[str, Detected],
    headers: Mapping[str, TensorHeader],
    zero_point: bool,
    dtype: torch.dtype,
) -> None:
    """Replace the modules of ``model`` that ``modules`` (by checkpoint name) says are quantized.

    Raises:
        CheckpointError: a quantized module has no place in the model, or a linear of the model no weight in the file.
        LayoutError: shapes differ.
    """
    names = Names.of(model)
    linears: dict[str, tuple[str, Detected]] = {}
    experts: dict[str, list[tuple[str, Detected]]] = defaultdict(list)
    lost: list[str] = []
    for name, found in modules.items():
        target, joined = names.target(f"{name}.weight")
        module_name = target.removesuffix(".weight")
        if joined and is_experts(model, target.rpartition(".")[0]):
            experts[target].append((name, found))
        elif not joined and isinstance(_find(model, module_name), nn.Linear):
            linears[module_name] = (name, found)
        else:
            lost.append(name)
    if lost:
        raise CheckpointError(
            f"{len(lost)} quantized modules of the checkpoint have no linear in {type(model).__name__} to go to: "
            f"{_some(lost)}; is config.json the one of this checkpoint?"
        )
    _check_complete(model, names, headers, linears, experts)
    with torch.device("meta"):
        for module_name, (name, found) in linears.items():
            _replace_linear(model, module_name, name, found, headers, zero_point, dtype)
        _replace_experts(model, experts, headers, zero_point, dtype)
        _replace_activations(model, names, modules, headers)


def _replace_linear(
    model: nn.Module,
    module_name: str,
    name: str,
    found: Detected,
    headers: Mapping[str, TensorHeader],
    zero_point: bool,
    dtype: torch.dtype,
) -> None:
    dense = model.get_submodule(module_name)
    _check_shape(name, found, dense.in_features, dense.out_features, headers)  # type: ignore[arg-type]
    new = AwqLinear(
        found.in_features,
        found.out_features,
        found.group_size,
        found.layout,
        bias=found.bias,
        zero_point=zero_point and found.layout != "marlin",
        dtype=dtype,
        scales_dtype=_scales_dtype(name, headers),
    )
    new.train(dense.training)
    model.set_submodule(module_name, new)


def _replace_experts(
    model: nn.Module,
    experts: Mapping[str, list[tuple[str, Detected]]],
    headers: Mapping[str, TensorHeader],
    zero_point: bool,
    dtype: torch.dtype,
) -> None:
    for path in sorted({target.rpartition(".")[0] for target in experts}):
        old: Any = model.get_submodule(path)
        parts = {
            target.rpartition(".")[2]: found for target, found in experts.items() if target.rpartition(".")[0] == path
        }
        missing = sorted({"gate_up_proj", "down_proj"} - set(parts))
        if missing:
            raise CheckpointError(f"{path}: the checkpoint has no quantized {' and '.join(missing)} of these experts")
        count, two_n, k = old.gate_up_proj.shape
        wanted = {"gate_up_proj": (k, two_n // 2, 2 * count), "down_proj": (two_n // 2, k, count)}
        layouts, sizes, whole = set(), set(), True
        for part, (in_features, out_features, number) in wanted.items():
            if len(parts[part]) != number:
                raise CheckpointError(
                    f"{path}.{part}: the checkpoint has {len(parts[part])} quantized weights for it, wanted {number}"
                )
            for name, found in parts[part]:
                _check_shape(name, found, in_features, out_features, headers)
                layouts.add(found.layout)
                sizes.add(found.group_size)
                whole &= found.group_size == found.in_features
        if len(layouts) > 1 or (len(sizes) > 1 and not whole):
            said = f"layouts {', '.join(sorted(layouts))}, group sizes {', '.join(map(str, sorted(sizes)))}"
            raise LayoutError(f"{path}: its experts differ in layout or group size ({said}), which cannot be joined")
        layout, group_size = layouts.pop(), sizes.pop() if len(sizes) == 1 else -1
        first = parts["gate_up_proj"][0][0]
        new = AwqExperts(
            count,
            k,
            two_n // 2,
            old.act_fn,
            group_size,
            layout,
            zero_point and layout != "marlin",
            dtype,
            _scales_dtype(first, headers),
        )
        new.train(old.training)
        model.set_submodule(path, new)


def _replace_activations(
    model: nn.Module, names: Names, modules: Mapping[str, Detected], headers: Mapping[str, TensorHeader]
) -> None:
    """A ``scales`` tensor without a qweight beside it belongs to an activation."""
    for key, header in headers.items():
        owner, _, suffix = key.rpartition(".")
        if suffix != "scales" or owner in modules or len(header.shape) != 1:
            continue
        path = names.target(f"{owner}.weight")[0].removesuffix(".weight")
        prefixed = path if _find(model, path) is not None else f"{names.prefix}.{path}"
        act = _find(model, prefixed)
        if act is None or isinstance(act, ScaledActivation):
            raise CheckpointError(
                f"{header.file}: {key} scales an activation that {type(model).__name__} does not have"
            )
        model.set_submodule(prefixed, ScaledActivation(act, header.shape[0], getattr(torch, header.dtype)))


def _check_complete(
    model: nn.Module,
    names: Names,
    headers: Mapping[str, TensorHeader],
    linears: Mapping[str, tuple[str, Detected]],
    experts: Mapping[str, Any],
) -> None:
    """Every linear and expert weight must be in the file: transformers would fill it with random numbers."""
    present = {names.target(key)[0] for key in headers}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and path not in linears
        and f"{path}.weight" not in present
        and f"{path}.weight" not in tied
    ]
    for path, module in model.named_modules():
        if is_experts(model, path):
            missing += [
                f"{path}.{part}"
                for part, _ in module.named_parameters(recurse=False)
                if f"{path}.{part}" not in present and f"{path}.{part}" not in experts
            ]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights of {type(model).__name__} are not in the checkpoint, neither quantized nor dense: "
            f"{_some(missing)}; is the download complete?"
        )


def _check_shape(name: str, found: Detected, k: int, n: int, headers: Mapping[str, TensorHeader]) -> None:
    if (found.in_features, found.out_features) != (k, n):
        raise LayoutError(
            f"{headers[f'{name}.qweight'].file}: {name} holds a weight of {found.in_features} inputs and "
            f"{found.out_features} outputs in layout {found.layout}, and the model wants {k} and {n}"
        )


def is_experts(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` is a mixture of experts with stacked 3-D weights."""
    module = _find(model, path)
    return all(getattr(getattr(module, part, None), "ndim", 0) == 3 for part in ("gate_up_proj", "down_proj"))


def _find(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _scales_dtype(name: str, headers: Mapping[str, TensorHeader]) -> torch.dtype:
    dtype = getattr(torch, headers[f"{name}.scales"].dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
