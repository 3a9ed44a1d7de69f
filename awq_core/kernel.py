"""What a backend offers: resident layouts, kernels that read them, and the Backend record that joins them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .capability import Capability, Reason
from .spec import Device, LinearSpec

if TYPE_CHECKING:
    import torch

ANY_LAYOUT = "*"


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


@dataclass(frozen=True, slots=True)
class Weight:
    """A prepared weight, as a kernel gets it: the problem, the resident layout and its tensors."""

    spec: LinearSpec
    layout: ResidentLayout
    tensors: Mapping[str, torch.Tensor]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The dense weight [K, N]."""
        return self.layout.dequantize(self.spec, self.tensors, dtype)


def _refuses_nothing(spec: LinearSpec) -> Reason | None:
    return None


def _always_there(device: Device) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute ``x @ w``, stateless apart from the prepared weight.

    ``apply(weight, x, bias)`` takes x [M, K], contiguous, in ``spec.dtype`` (M >= 1) and returns a new [M, N] in the
    same dtype; it never writes to the weight's tensors. Unless ``adds_bias``, core adds the bias and passes None.
    ``reads`` names the resident layout (``"*"``: whichever the plan has). ``refuses`` is for rules that no Capability
    field can say, and is asked only after a record has accepted.
    """

    name: str
    reads: str
    capabilities: tuple[Capability, ...]
    apply: Callable[[Weight, torch.Tensor, torch.Tensor | None], torch.Tensor]
    refuses: Callable[[LinearSpec], Reason | None] = field(default=_refuses_nothing)
    adds_bias: bool = False


@dataclass(frozen=True, slots=True)
class Backend:
    """A family of kernels under one name, which is what a user asks for with ``AwqConfig(version=name)``.

    ``probe(device)`` says why the backend cannot run on this real device now (None: it can); it may import what is
    heavy, is asked only once its records have accepted, and its answer is cached.
    """

    name: str
    kernels: tuple[Kernel, ...]
    layouts: tuple[ResidentLayout, ...] = ()
    probe: Callable[[Device], str | None] = field(default=_always_there)
