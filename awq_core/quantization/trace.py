"""What a decoder block is made of, found by running it: no list of architectures.

A short run with random activations shows which linears read the same tensor and which module wrote it. Where no module
did (the input was computed in between), two probes look for a linear whose outputs pass through but for a factor:

* on sequences of one token attention hands its values on, so an input channel that *equals* an output channel of an
  earlier linear is fed by it (v to o, whatever packing and grouping of heads);
* a channel that is linear in an output channel has ``dz/dy * y == z`` (up to down through the gate's product, or
  through ReLU); one backward pass tells it for all channels at once.

Every finding is then tried with random scales: a fold that changes the block's output is dropped. That also catches
what the trace cannot see, such as a norm whose output goes into the residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .call import Call
from .fold import Activation, Before, Group, Norm, Rows, fold
from .unstack import Expert, UnstackedExperts

EQUAL = 1e-4  # relative error within which two runs in float32 are the same
RUNS = 24  # sequences of one token in the probes
Key = tuple[int, int, int]


@dataclass(frozen=True)
class Traced:
    """The groups of a block in the order in which they run, and the folds that were found and did not hold."""

    groups: tuple[Group, ...]
    dropped: tuple[str, ...]


def trace(block: nn.Module, one: Call, many: Call, wanted: Sequence[str], activations: bool = False) -> Traced:
    """Find the groups of the linears ``wanted`` of ``block`` (in float32, its experts unstacked; it is not changed).

    ``one`` calls it with sequences of one token, ``many`` with longer ones; ``activations`` allows scales beside an
    activation, which only some architectures' loaders read.
    """
    block = copy.deepcopy(block).requires_grad_(True)
    for module in block.modules():
        if isinstance(module, UnstackedExperts):
            module.every = True
    record = _Record(block)
    hidden = _noise(one.hidden).requires_grad_(True)
    with torch.enable_grad(), record:
        one.run(block, hidden)
    names = set(wanted)
    order: dict[Key, list[str]] = {}
    for name, (key, _) in record.inputs.items():
        if name in names:
            order.setdefault(key, []).append(name)
    groups, dropped = [], []
    for key, linears in order.items():
        consumers = [name for name, (read, _) in record.reads if read == key]
        before = _before(record, key, linears, activations)
        group = Group(tuple(linears), tuple(dict.fromkeys(consumers)), _inputs(block, linears), before)
        if before is not None and not _holds(block, group, many):
            dropped.append(f"{', '.join(linears)}: scaling through {before.path} changes the block")
            group = replace(group, before=None)
        groups.append(group)
    return Traced(tuple(groups), tuple(dropped))


class _Record(TorchFunctionMode):
    """Tensors that go into linears and come out of modules; all are kept alive, so that storages stay distinct."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.params = {id(p): name for name, p in block.named_parameters()}
        self.inputs: dict[str, tuple[Key, torch.Tensor]] = {}  # of linears, by module
        self.outputs: dict[str, torch.Tensor] = {}  # of linears
        self.reads: list[tuple[str, tuple[Key, torch.Tensor]]] = []  # parameters multiplied with an input
        self.writers: dict[Key, list[str]] = {}  # modules by the tensor that they returned
        self.kept: list[Any] = []

    def __enter__(self) -> Any:
        self.hooks = [
            module.register_forward_hook(self._hook(path)) for path, module in self.block.named_modules() if path
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *args: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note each ``F.linear`` on a parameter, such as a router's that is no module."""
        if func is nn.functional.linear and len(args) > 1 and id(args[1]) in self.params:
            self._read(self.params[id(args[1])], args[0])
        return func(*args, **(kwargs or {}))

    def _read(self, parameter: str, x: torch.Tensor) -> None:
        self.kept.append(x)
        if parameter not in [name for name, _ in self.reads]:
            self.reads.append((parameter, (_key(x), x)))

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, nn.Linear) and args:
                self.inputs.setdefault(path, (_key(args[0]), args[0]))
                self.outputs.setdefault(path, output)
                self._read(f"{path}.weight", args[0])
            if isinstance(output, torch.Tensor):
                self.kept.append((args, output))
                self.writers.setdefault(_key(output), []).append(path)

        return hook


def _key(x: torch.Tensor) -> Key:
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel()


def _before(record: _Record, key: Key, linears: Sequence[str], activations: bool) -> Before | None:
    x = record.inputs[linears[0]][1]
    beside = None
    for path in record.writers.get(key, []):
        module = record.block.get_submodule(path)
        own = dict(module.named_parameters())
        weight = own.get("weight")
        if not isinstance(module, nn.Linear) and set(own) <= {"weight", "bias"} and weight is not None:
            if weight.shape == x.shape[-1:] and (offset := _offset(module, x)) is not None:
                return Norm(path, offset)
        elif activations and not own and not any(True for _ in module.children()):
            beside = Activation(path)
    earlier = {name: y for name, y in record.outputs.items() if name not in linears}
    return _copied(x, earlier) or _product(x, earlier) or beside


def _offset(norm: nn.Module, x: torch.Tensor) -> float | None:
    """0 where the norm multiplies by its weight, 1 where by one plus it (Gemma), None where it does neither."""
    norm = copy.deepcopy(norm)
    sample = torch.randn(4, x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x.device)
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.zero_() if name == "bias" else None
        for offset in (0.0, 1.0):
            norm.get_parameter("weight").fill_(-offset)
            if not bool(norm(sample).any()):
                return offset
    return None


def _copied(x: torch.Tensor, earlier: dict[str, torch.Tensor]) -> Rows | None:
    """The linear whose output channels are the input channels of ``x``."""
    z = x.detach().reshape(-1, x.shape[-1])
    for name in reversed(earlier):
        y = earlier[name].detach().reshape(-1, earlier[name].shape[-1])
        if len(y) == len(z) and (rows := _match(z, y)) is not None:
            return Rows(name, rows)
    return None


def _product(x: torch.Tensor, earlier: dict[str, torch.Tensor]) -> Rows | None:
    """The linear in whose output channels the channels of ``x`` are linear, one each."""
    if not x.requires_grad:
        return None
    weights = (torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(0)) + 0.5).to(x.device)
    names = [name for name, y in earlier.items() if y.requires_grad]
    gradients = torch.autograd.grad(
        x, [earlier[n] for n in names], weights.expand_as(x), retain_graph=True, allow_unused=True
    )
    z = (x.detach() * weights).reshape(-1, x.shape[-1])
    for name, gradient in reversed(list(zip(names, gradients, strict=True))):
        if gradient is None or gradient.numel() // gradient.shape[-1] != len(z):
            continue
        y = (gradient * earlier[name].detach()).reshape(len(z), -1)
        if (rows := _match(z, y)) is not None:
            return Rows(name, rows)
    return None


def _match(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """For each column of ``z`` [T, Z] the equal column of ``y`` [T, Y], or None where one has none."""
    mix = torch.randn(len(z), generator=torch.Generator().manual_seed(0)).to(z)
    have, wanted = mix @ y, mix @ z
    order = torch.argsort(have)
    place = torch.searchsorted(have[order], wanted)
    best = torch.full_like(wanted, float("inf"))
    rows = torch.zeros_like(place)
    for step in (-2, -1, 0, 1):
        tried = order[(place + step).clamp(0, len(order) - 1)]
        error = (y[:, tried] - z).norm(dim=0)
        rows = torch.where(error < best, tried, rows)
        best = torch.minimum(best, error)
    size = z.norm(dim=0)
    if bool((best > EQUAL * size.clamp(min=1e-6)).any()) or not bool(size.any()):
        return None
    silent = size == 0  # as behind a ReLU: any silent channel fits, so take the one in line with the others
    shift = (rows - torch.arange(len(rows), device=rows.device))[~silent].mode().values
    in_line = (torch.arange(len(rows), device=rows.device) + shift).clamp(0, len(order) - 1)
    return torch.where(silent, in_line, rows)


def _holds(block: nn.Module, group: Group, call: Call) -> bool:
    """Whether the block computes the same after ``group``'s input is scaled at random."""
    hidden = _noise(call.hidden)
    with torch.no_grad():
        wanted = call.run(block, hidden)
        scaled = copy.deepcopy(block)
        size = scaled.get_submodule(group.linears[0]).in_features
        generator = torch.Generator().manual_seed(0)
        scales = torch.exp2(torch.rand(int(size), generator=generator) * 2 - 1).to(hidden.device)  # type: ignore[arg-type]
        fold(scaled, group, group.tie(scales))
        found = call.run(scaled, hidden)
    error = (found - wanted).norm() / (wanted - hidden).norm().clamp(min=1e-12)
    return bool(error <= 10 * EQUAL)


def _inputs(block: nn.Module, linears: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The linears by what they really read: those of one expert together, the others all together."""
    sets: dict[str, list[str]] = {}
    for name in linears:
        parent = name.rpartition(".")[0]
        owner = parent if parent and isinstance(block.get_submodule(parent), Expert) else ""
        sets.setdefault(owner, []).append(name)
    return tuple(tuple(names) for names in sets.values())


def _noise(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = like.float().pow(2).mean().sqrt().clamp(min=1e-3).cpu()
    return (torch.randn(like.shape, generator=generator) * size).to(like.device)
