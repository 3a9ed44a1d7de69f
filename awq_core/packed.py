"""A weight that loads as checkpoint tensors, is bound to a plan, and saves as checkpoint tensors again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .dispatch import Plan
from .errors import LayoutError
from .kernel import Weight
from .layouts import checkpoint_layout
from .ops import apply_plan, intern_plan
from .request import Request, current_request
from .selection import select
from .spec import Device, LinearSpec
from .tuning import representatives

DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}

_warmed: set[tuple[object, ...]] = set()


class PackedWeight:
    """The state of one quantized weight that ``owner`` holds as parameters, before and after binding.

    Unbound, the owner's parameters ``prefix + suffix`` are the checkpoint tensors. Bound to a plan whose resident
    layout is another one, they are None, ``resident`` holds the prepared tensors and ``held`` the record of them that
    kernels get; ``checkpoint()`` restores them, bit for bit. The prepared tensors are the owner's buffers too, not
    persistent ones: counted, but never saved.
    """

    def __init__(self, owner: nn.Module, prefix: str, spec: LinearSpec, scales_dtype: torch.dtype) -> None:
        self.owner = owner
        self.prefix = prefix
        self.spec = spec
        self.scales_dtype = scales_dtype
        self.plan: Plan | None = None
        self.key = ""
        self.resident: dict[str, torch.Tensor] | None = None
        self.held: Weight | None = None
        layout = checkpoint_layout(spec.layout)
        refused = layout.refuses(spec.in_features, spec.out_features, spec.group_size)
        if refused is not None:
            raise LayoutError(f"layout {spec.layout} cannot hold {spec}: {refused}")
        lead = (spec.experts,) if spec.experts else ()
        self.suffixes = tuple(layout.shapes(spec.in_features, spec.out_features, spec.group_size))
        for suffix, wanted in layout.shapes(spec.in_features, spec.out_features, spec.group_size).items():
            dtype = getattr(torch, wanted.dtypes[0])
            if dtype.is_floating_point:
                dtype = scales_dtype
            empty = torch.empty(*lead, *wanted.shape, dtype=dtype)
            owner.register_parameter(prefix + suffix, nn.Parameter(empty, requires_grad=False))

    def stored(self) -> dict[str, torch.Tensor]:
        """The owner's checkpoint parameters as they are now (an accelerate hook may have just put them there)."""
        return {s: self.owner._parameters[self.prefix + s] for s in self.suffixes}  # type: ignore[misc]

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What the plan's kernels read."""
        return self.resident if self.resident is not None else self.stored()

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The checkpoint tensors by suffix, bit for bit as they were loaded, whatever is bound."""
        if self.resident is None or self.plan is None:
            return self.stored()
        return self.plan.resident.restore(self.plan.spec, self.resident)

    def device(self) -> torch.device:
        """Where the weight lies."""
        return next(iter(self.tensors().values())).device

    def bind(self, dtype: torch.dtype, request: Request | None = None, on: torch.device | None = None) -> None:
        """Choose kernels for activations of ``dtype`` and prepare the weight for them.

        ``on`` names the device of execution where the parameters are offloaded: the weight then stays as it is stored.
        """
        offloaded = on is not None
        device = on if on is not None else self.device()
        if device.type == "meta":
            return
        self.unbind()
        spec = self._spec(dtype, device)
        plan = select(spec, request or current_request(), stored=offloaded)
        if plan.resident.name != spec.layout:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be used for a gradient
                prepared = plan.resident.prepare(spec, {s: t.detach() for s, t in self.stored().items()})
            for suffix in self.suffixes:
                self.owner._parameters[self.prefix + suffix] = None
            self._keep(prepared)
        self.plan = plan
        self._hold()
        self.key = intern_plan(plan, tuple(self.tensors()))
        if not offloaded:
            self._warm()

    def unbind(self) -> None:
        """Back to checkpoint parameters."""
        if self.resident is not None:
            with torch.inference_mode(False), torch.no_grad():
                restored = self.checkpoint()
            for suffix, tensor in restored.items():
                self.owner._parameters[self.prefix + suffix] = nn.Parameter(tensor, requires_grad=False)
            for name in self.buffers():
                delattr(self.owner, name)
        self.resident, self.held, self.plan, self.key = None, None, None, ""

    def move(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``convert`` (a ``.to`` of the owner) to the checkpoint tensors: devices follow it, dtypes stay."""
        for suffix in self.suffixes:
            old = self.owner._parameters[self.prefix + suffix]
            assert old is not None  # the caller has unbound
            new = convert(old.data)
            kept = new if new.dtype == old.dtype else old.data.to(new.device)
            self.owner._parameters[self.prefix + suffix] = nn.Parameter(kept, requires_grad=False)

    def touch(self, convert: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a ``convert`` that leaves the device as it is (``share_memory``, a ``.to`` that changes nothing)."""
        if self.resident is None:
            return self.move(convert)
        converted = {name: (tensor, convert(tensor)) for name, tensor in self.resident.items()}
        return self._keep({name: new if new.dtype == old.dtype else old for name, (old, new) in converted.items()})

    def buffers(self) -> tuple[str, ...]:
        """The owner's buffers that hold the resident tensors."""
        return tuple(f"{self.prefix}resident_{name}" for name in self.resident or ())

    def _keep(self, resident: dict[str, torch.Tensor]) -> None:
        self.resident = resident
        self._hold()
        for buffer, tensor in zip(self.buffers(), resident.values(), strict=True):
            self.owner.register_buffer(buffer, tensor, persistent=False)

    def _hold(self) -> None:
        """Make the record that kernels get once, where its tensors stay: making it shows in a decode step."""
        if self.plan is not None and self.resident is not None:
            self.held = Weight(self.plan.spec, self.plan.resident, self.resident)

    def __getstate__(self) -> dict[str, Any]:
        """Without the plan, whose kernels may not be picklable; ``PackedModule`` binds anew."""
        return self.__dict__ | {"resident": None, "held": None, "plan": None, "key": ""}

    def _spec(self, dtype: torch.dtype, device: torch.device) -> LinearSpec:
        return replace(self.spec, dtype=DTYPE_NAMES.get(dtype, str(dtype)), device=Device.of(device))

    def _warm(self) -> None:
        """Run the plan on a GPU at each size that it tells apart, so that nothing compiles under a graph capture."""
        assert self.plan is not None
        if self.device().type == "cpu":
            return
        known = (self.key, self.device(), *(tensor.dtype for tensor in self.tensors().values()))
        if known in _warmed:
            return
        tensors = {n: t[0] for n, t in self.tensors().items()} if self.spec.experts else self.tensors()
        weight = Weight(self.plan.spec, self.plan.resident, tensors)
        dtype = getattr(torch, self.plan.spec.dtype)
        bias = torch.zeros(self.spec.out_features, dtype=dtype, device=self.device()) if self.spec.bias else None
        for band in self.plan.bands:
            for rows in representatives(band.rows.first, band.rows.last):
                x = torch.zeros(rows, self.spec.in_features, dtype=dtype, device=self.device())
                apply_plan(self.plan, weight, x, bias)
        _warmed.add(known)


class PackedModule(nn.Module):
    """Base of the modules that hold packed weights: moving, casting, saving and loading them."""

    packed: dict[str, PackedWeight]

    def __init__(self) -> None:
        super().__init__()
        self.packed = {}
        self.dtype: torch.dtype = torch.get_default_dtype()
        self.request: Request | None = None
        self.place: torch.device | None = None

    def bind(
        self, dtype: torch.dtype | None = None, request: Request | None = None, on: torch.device | None = None
    ) -> None:
        """Bind every weight for activations of ``dtype``, under ``request``, on the device ``on`` of execution.

        All three are remembered for binding anew; ``on`` is given only where the parameters are offloaded.
        """
        dtype = dtype or self.dtype
        self.request = request or self.request
        self.place = on or self.place
        for weight in self.packed.values():
            weight.bind(dtype, self.request, self.place)
        self.dtype = dtype

    @property
    def plans(self) -> dict[str, Plan]:
        """The bound plans by weight; empty before binding."""
        return {name: w.plan for name, w in self.packed.items() if w.plan is not None}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        """``.to``, ``.cuda``, ``.half``: devices follow, codes and scales keep dtypes, kernels are chosen anew."""
        bound = bool(self.plans)
        device = next(iter(self.packed.values())).device()
        probe = fn(torch.empty(0, dtype=self.dtype, device=device))
        if probe.device == device and probe.dtype == self.dtype:
            for weight in self.packed.values():
                weight.touch(fn)
            self._apply_others(fn, recurse)
            return self
        for weight in self.packed.values():
            weight.unbind()
            weight.move(fn)
        self._apply_others(fn, recurse)
        self.dtype, self.place = probe.dtype, None
        if bound:
            self.bind()
        return self

    def _apply_others(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool) -> None:
        names = [w.prefix + s for w in self.packed.values() for s in w.suffixes]
        held = {name: self._parameters.pop(name) for name in names}
        buffers = {name: self._buffers.pop(name) for w in self.packed.values() for name in w.buffers()}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters = {**held, **self._parameters}  # keeps the order of registration
            self._buffers = {**self._buffers, **buffers}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for weight in self.packed.values():  # first, as they were registered
            if weight.resident is not None:
                for suffix, tensor in weight.checkpoint().items():
                    destination[prefix + weight.prefix + suffix] = tensor
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        rebind = False
        for weight in self.packed.values():
            if any(prefix + weight.prefix + suffix in state_dict for suffix in weight.suffixes):
                rebind |= weight.plan is not None
                weight.unbind()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if rebind:
            self.bind()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: checkpoint tensors as parameters, and whether to bind them again."""
        stored = {
            weight.prefix + suffix: nn.Parameter(tensor.detach(), requires_grad=False)
            for weight in self.packed.values()
            if weight.resident is not None
            for suffix, tensor in weight.checkpoint().items()
        }
        resident = {name for weight in self.packed.values() for name in weight.buffers()}
        return self.__dict__ | {
            "_parameters": {name: stored.get(name, tensor) for name, tensor in self._parameters.items()},
            "_buffers": {name: tensor for name, tensor in self._buffers.items() if name not in resident},
            "_non_persistent_buffers_set": self._non_persistent_buffers_set - resident,
            "_bound": bool(self.plans),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        bound = state.pop("_bound")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if bound:
            self.bind()


def bind_for(module: PackedModule, dtype: torch.dtype) -> None:
    """``module.bind(dtype)`` in a forward: torch.compile does not look into it, since repacking is not for a graph."""
    if torch.compiler.is_compiling():
        _bind_unseen(module, dtype)
    else:
        module.bind(dtype)


@torch._disable_dynamo  # type: ignore[attr-defined] # as torch.compiler.disable, which would import the compiler now
def _bind_unseen(module: PackedModule, dtype: torch.dtype) -> None:
    module.bind(dtype)
