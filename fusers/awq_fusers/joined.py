"""Several quantized linears of one input as one, and the readers that stand in their places.

The model's own attention and MLP modules stay as they are. Only their projections are swapped: each becomes a reader,
the first of which to see an input computes the joined product, and each hands out its slice. So rope, caches, masks,
q/k norms and whatever else a model's forward does remain its own, and nothing here knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from awq_core.api import checkpoint_layout
from awq_core.linear import AwqLinear


class JoinedLinear(AwqLinear):
    """The parts' outputs side by side: [..., K] -> [..., N1 + N2 + ...], one weight, one kernel launch.

    Built from bound or unbound AwqLinears that ``refuses`` has nothing against, it takes over their tensors: those of
    the checkpoint, concatenated along N. ``split`` gives them back, bit for bit. It saves and loads nothing itself: its
    readers do, under the parts' own names.
    """

    def __init__(self, parts: Sequence[AwqLinear]) -> None:
        first = parts[0]
        spec = first.weight_state.spec
        bound = bool(first.plans)
        for part in parts:
            part.weight_state.unbind()
        with torch.device("meta"):
            super().__init__(
                spec.in_features,
                sum(part.out_features for part in parts),
                spec.group_size,
                spec.layout,
                bias=first.bias is not None,
                zero_point=spec.zero_point,
                dtype=first.dtype,
                scales_dtype=first.weight_state.scales_dtype,
            )
        self.parts = tuple(parts)  # a tuple, so that they are no submodules
        self.sizes = tuple(part.out_features for part in parts)
        self.request = first.request
        self.train(first.training)
        axes = checkpoint_layout(spec.layout).out_axis
        for suffix in self.weight_state.suffixes:
            joined = torch.cat([_take(part, suffix) for part in parts], dim=axes[suffix])
            self._parameters[suffix] = nn.Parameter(joined, requires_grad=False)
        if first.bias is not None:
            trained = any(part.bias.requires_grad for part in parts if part.bias is not None)
            self._parameters["bias"] = nn.Parameter(torch.cat([_take(p, "bias") for p in parts]), requires_grad=trained)
        # Who has read what of which input: one tuple, replaced as a whole, so that two threads never see half of it.
        self._held: tuple[torch.Tensor, int, torch.Tensor, int] | None = None
        self._all = (1 << len(parts)) - 1
        self._rebind = False
        self._restored: tuple[object, dict[str, torch.Tensor], int] | None = None  # of what, what, by whom taken
        if bound:
            self.bind()

    def read(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The output of part ``index`` for x [..., K]: computed at the first read of an input, dropped at the last.

        A part that reads the same input again, or another input than the one before, computes anew.
        """
        bit = 1 << index
        version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
        held = self._held
        if held is None or held[0] is not x or held[1] != version or held[3] & bit:
            product: torch.Tensor = self(x)
            y, taken = product, bit
        else:
            y, taken = held[2], held[3] | bit
        self._held = None if taken == self._all else (x, version, y, taken)
        return y.narrow(-1, sum(self.sizes[:index]), self.sizes[index])

    def restored(self, index: int) -> dict[str, torch.Tensor]:
        """All checkpoint tensors, for part ``index`` to write its own: restored once for all parts that are saved."""
        resident, bit = self.weight_state.resident, 1 << index
        if resident is None:
            return self.weight_state.stored()
        held = self._restored
        if held is None or held[0] is not resident or held[2] & bit:
            held = (resident, self.weight_state.checkpoint(), 0)
        tensors, taken = held[1], held[2] | bit
        self._restored = None if taken == self._all else (resident, tensors, taken)
        return tensors

    def part(self, index: int, tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Views of part ``index`` of the checkpoint ``tensors`` (restored if not given) by suffix, and of the bias."""
        axes = checkpoint_layout(self.spec.layout).out_axis
        found = {}
        for suffix, tensor in (tensors or self.weight_state.checkpoint()).items():
            share = tensor.shape[axes[suffix]] * self.sizes[index] // self.out_features
            before = tensor.shape[axes[suffix]] * sum(self.sizes[:index]) // self.out_features
            found[suffix] = tensor.detach().narrow(axes[suffix], before, share)
        if self.bias is not None:
            found["bias"] = self.bias.detach().narrow(0, sum(self.sizes[:index]), self.sizes[index])
        return found

    def split(self) -> tuple[AwqLinear, ...]:
        """The parts with their tensors back, where and in what dtype of activations this module is now."""
        bound = bool(self.plans)
        self.weight_state.unbind()
        stored = self.weight_state.stored()
        for index, part in enumerate(self.parts):
            for suffix, tensor in self.part(index, stored).items():
                trained = suffix == "bias" and self.bias is not None and self.bias.requires_grad
                part._parameters[suffix] = nn.Parameter(tensor.clone(), requires_grad=trained)
            part.dtype, part.request, part.place = self.dtype, self.request, self.place
            part.train(self.training)
            if bound:
                part.bind()
        return self.parts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Nothing: each reader writes its part."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: the readers, which come before it in their block, have loaded their parts."""
        if self._rebind:
            self.bind()
        self._rebind = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_held": None, "_restored": None}


class JoinedPart(nn.Module):
    """Stands in the place of part ``index`` of a joined linear: [..., K] -> [..., N of the part].

    Its state dict is the part's, in checkpoint form.
    """

    def __init__(self, joined: JoinedLinear, index: int) -> None:
        super().__init__()
        self._joined = (joined,)  # not a submodule here: the block holds it, once
        self.index = index
        self.in_features, self.out_features = joined.in_features, joined.sizes[index]
        self.train(joined.training)

    @property
    def joined(self) -> JoinedLinear:
        """The joined linear that it reads."""
        return self._joined[0]

    @property
    def qweight(self) -> torch.Tensor:
        """Its part of the codes in checkpoint form, for those who look at a weight (restored if it was repacked)."""
        return self.joined.part(self.index)["qweight"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], a view of the joined product."""
        return self._joined[0].read(x, self.index)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for suffix, tensor in self.joined.part(self.index, self.joined.restored(self.index)).items():
            destination[prefix + suffix] = tensor.clone()  # no storage is shared: savers would take it for tied

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        joined = self.joined
        joined._rebind |= bool(joined.plans)
        joined.weight_state.unbind()
        for suffix, own in self.joined.part(self.index).items():
            new = state_dict.get(prefix + suffix)
            if new is None:
                missing_keys.append(prefix + suffix)
            elif new.shape != own.shape:
                error_msgs.append(f"{prefix}{suffix} has shape {list(new.shape)}, wanted {list(own.shape)}")
            else:
                own.copy_(new)
        known = {prefix + suffix for suffix in self.joined.part(self.index)}
        unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    def extra_repr(self) -> str:
        """What it reads."""
        return f"K={self.in_features}, N={self.out_features}, part {self.index} of a joined linear"


def refuses(parts: Mapping[str, nn.Module]) -> str | None:
    """Why these modules (by name) cannot be joined, or None."""
    for name, module in parts.items():
        if not isinstance(module, AwqLinear):
            kind = "is not quantized" if isinstance(module, nn.Linear) else f"is a {type(module).__name__}"
            return f"{name} {kind}"
    for what, of in _ALIKE.items():
        values = {name: of(module) for name, module in parts.items()}
        if len(set(values.values())) > 1:
            return f"its projections differ in {what}: " + ", ".join(f"{n} {v}" for n, v in values.items())
    total = sum(module.out_features for module in parts.values())  # type: ignore[misc]
    first: Any = next(iter(parts.values()))
    spec = first.weight_state.spec
    return checkpoint_layout(spec.layout).refuses(spec.in_features, total, spec.group_size)


def offloaded(parts: Mapping[str, nn.Module]) -> bool:
    """Whether a part has its tensors elsewhere until it runs: they cannot be joined."""
    return any(
        bool(getattr(getattr(module, "_hf_hook", None), "offload", False))
        or module.weight_state.device().type == "meta"
        for module in parts.values()
        if isinstance(module, AwqLinear)
    )


_ALIKE: dict[str, Any] = {
    "in_features": lambda part: part.in_features,
    "group size": lambda part: part.weight_state.spec.group_size,
    "layout": lambda part: part.weight_state.spec.layout,
    "zero_point": lambda part: part.weight_state.spec.zero_point,
    "bias": lambda part: "none" if part.bias is None else str(part.bias.dtype),
    "dtype": lambda part: part.dtype,
    "dtype of the scales": lambda part: part.weight_state.scales_dtype,
    "device": lambda part: part.weight_state.device(),
}


def _take(part: AwqLinear, name: str) -> torch.Tensor:
    """A parameter of a part, which loses it: at most one tensor of a group exists twice."""
    tensor = part._parameters[name]
    assert tensor is not None
    part._parameters[name] = None
    return tensor.detach()
