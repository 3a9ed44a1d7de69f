"""What a backend offers: resident layouts, kernels that read them, and the Backend record that joins them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .capability import Capability, Reason
from .guard import require
from .spec import Device, LinearSpec

if TYPE_CHECKING:
    import torch

ANY_LAYOUT = "*"
NAME = re.compile("[a-z0-9][a-z0-9_-]*")  # requests are put in lower case and separated by commas and dots
NAME_RULE = "a name of a-z, 0-9, _ and -"


@dataclass(frozen=True, slots=True)
class ResidentLayout:
    """How a weight lies in memory while it is used; every checkpoint layout is one too (as it is stored).

    * ``prepare(spec, tensors)``: checkpoint tensors (``spec.layout``) to resident tensors; it changes no input
    * ``restore(spec, tensors)``: the inverse, bit for bit, for saving and for moving to another device
    * ``dequantize(spec, tensors, dtype)``: the dense weight [K, N] in ``dtype`` (for backward and as the last resort)
    * ``nbytes(spec)``: bytes that the resident tensors of one module (or of all its experts) take
    """

    name: str
    prepare: Callable[[LinearSpec, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    restore: Callable[[LinearSpec, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    dequantize: Callable[[LinearSpec, Mapping[str, torch.Tensor], torch.dtype], torch.Tensor]
    nbytes: Callable[[LinearSpec], int]
    note: str = ""

    def __post_init__(self) -> None:
        ok = isinstance(self.name, str) and self.name not in ("", ANY_LAYOUT)
        require(ok, "ResidentLayout.name", 'a name (and not "*")', self.name)
        require(isinstance(self.note, str), f"ResidentLayout {self.name!r}: note", "a text", self.note)
        _callable(self, "prepare", "restore", "dequantize", "nbytes")


@dataclass(frozen=True, slots=True)
class Weight:
    """A prepared weight, as a kernel gets it: the problem, the resident layout and its tensors."""

    spec: LinearSpec
    layout: ResidentLayout
    tensors: Mapping[str, torch.Tensor]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight [K, N]."""
        return self.layout.dequantize(self.spec, self.tensors, dtype)


@dataclass(frozen=True, slots=True)
class TritonSource:
    """One Triton function as a kernel launches it, so that it can be compiled for a GPU that is not in this machine.

    * ``function``: what ``@triton.jit`` returned
    * ``signature``: the type of each argument at run time by name, as Triton writes them: ``"*fp16"``, ``"*i32"``,
      ``"i32"``; ``"*fp16:16"`` says that it is always divisible by 16 (pointers of torch tensors are)
    * ``constants``: the value of each ``tl.constexpr`` argument by name
    * ``options``: what the launch is given beside arguments: ``num_warps``, ``num_stages``
    """

    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


def _refuses_nothing(spec: LinearSpec) -> Reason | None:
    return None


def no_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    """The default of ``Kernel.sources``: nothing is said of Triton code."""
    return ()


def nothing_to_tune(spec: LinearSpec, rows: int) -> Sequence[Mapping[str, int]]:
    """The default of ``Kernel.tunables``: there is one way to run it."""
    return ()


def _always_there(device: Device) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Normed:
    """A row that a linear is to make itself: the RMSNorm of the residual stream, all in one dtype.

    ``x`` [1, K] is the stream; ``plus`` [1, K], where it is given, is added to it first, and ``out`` [1, K], which is
    neither of the two, receives the sum. ``offset``: the factor is ``1 + weight`` and rounding comes last (Gemma). A
    kernel may read the norm's weight, and its own, before the kernel in front of it has ended: that one must not write
    them.
    """

    x: torch.Tensor
    plus: torch.Tensor | None
    weight: torch.Tensor
    eps: float
    offset: bool
    out: torch.Tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute ``x @ w``, stateless apart from the prepared weight.

    ``apply(weight, x, bias)`` takes x [M, K], contiguous, in ``spec.dtype`` (M >= 1) and returns a new [M, N] in the
    same dtype; it never writes to the weight's tensors. Unless ``adds_bias``, core adds the bias and passes None.
    ``reads`` names the resident layout (``"*"``: whichever the plan has). ``refuses`` is for rules that no Capability
    field can say, and is asked only after a record has accepted. ``sources(spec)`` lists the Triton functions that
    ``apply`` may launch for this problem at any M; the conformance kit compiles them for every declared GPU.
    ``tunables(spec, rows)`` lists the configs that ``awq tune`` measures at M = ``rows``; ``apply`` gets the best one
    back from ``awq_core.api.tuned("backend.kernel", spec, rows, x.device)``.
    ``epilogues`` are variants for fused blocks, by name, for linears without bias and M in ``capabilities``:
    ``silu_mul(weight, x)``, N a multiple of 32, gives ``silu(y[:, :N/2]) * y[:, N/2:]``, and ``add(weight, x, other)``
    gives ``y + other``. For M = 1: ``norm(weight, normed, bias)``, with or without a bias, and
    ``norm_silu_mul(weight, normed)`` multiply a ``Normed`` row.
    """

    name: str
    reads: str
    capabilities: tuple[Capability, ...]
    apply: Callable[[Weight, torch.Tensor, torch.Tensor | None], torch.Tensor]
    refuses: Callable[[LinearSpec], Reason | None] = field(default=_refuses_nothing)
    adds_bias: bool = False
    sources: Callable[[LinearSpec], Sequence[TritonSource]] = field(default=no_sources)
    tunables: Callable[[LinearSpec, int], Sequence[Mapping[str, int]]] = field(default=nothing_to_tune)
    epilogues: Mapping[str, Callable[..., torch.Tensor]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        _named(self, self.name)
        require(isinstance(self.reads, str), f"Kernel {self.name!r}: reads", "the name of a layout", self.reads)
        _tuple_of(Capability, self, "capabilities")
        _callable(self, "apply", "refuses", "sources", "tunables")
        require(isinstance(self.adds_bias, bool), f"Kernel {self.name!r}: adds_bias", "True or False", self.adds_bias)


@dataclass(frozen=True, slots=True)
class Backend:
    """A family of kernels under one name, which is what a user asks for with ``AwqConfig(version=name)``.

    ``probe(device)`` says why the backend cannot run on this real device now (None: it can); it may import what is
    heavy, is asked only once its records have accepted, and its answer is cached.

    Names are of a-z, 0-9, ``_`` and ``-``. All these records raise ValueError where a field has a wrong type.
    """

    name: str
    kernels: tuple[Kernel, ...]
    layouts: tuple[ResidentLayout, ...] = ()
    probe: Callable[[Device], str | None] = field(default=_always_there)

    def __post_init__(self) -> None:
        _named(self, self.name)
        _tuple_of(Kernel, self, "kernels")
        _tuple_of(ResidentLayout, self, "layouts")
        _callable(self, "probe")
        names = [kernel.name for kernel in self.kernels]
        require(len(set(names)) == len(names), f"Backend {self.name!r}: kernels", "of different names", names)


def _named(record: object, name: object) -> None:
    require(
        isinstance(name, str) and NAME.fullmatch(name) is not None, f"{type(record).__name__}.name", NAME_RULE, name
    )


def _tuple_of(kind: type, record: Kernel | Backend, name: str) -> None:
    value = getattr(record, name)
    ok = isinstance(value, tuple) and all(isinstance(item, kind) for item in value)
    require(ok, f"{type(record).__name__} {record.name!r}: {name}", f"a tuple of {kind.__name__}", value)


def _callable(record: Kernel | Backend | ResidentLayout, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        require(callable(value), f"{type(record).__name__} {record.name!r}: {name}", "a function", value)
