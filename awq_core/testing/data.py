"""Random weights and activations for checking kernels, and the exact result in float64 to check them against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..layouts import Codes, checkpoint_layout, dequantize
from ..spec import LinearSpec

ZERO_POINTS = ("random", "0", "15")
GUARD = 256  # elements of garbage on either side of a guarded tensor


@dataclass(frozen=True)
class Sample:
    """One weight in checkpoint form with an activation: what a kernel gets, and what it should return.

    ``tensors`` are checkpoint tensors (stacked where ``spec.experts``), ``x`` is [M, K]; ``exact`` [M, N] and ``bound``
    [M, N] are float64: the exact product, and ``|x| @ |w|``, by which an element's error is judged.
    """

    spec: LinearSpec
    tensors: Mapping[str, torch.Tensor]
    x: torch.Tensor
    exact: torch.Tensor
    bound: torch.Tensor


def random_codes(spec: LinearSpec, generator: torch.Generator, zeros: str = "random") -> Codes:
    """Codes over the whole range 0 to 15, with float16 scales; ``zeros`` is ``random``, ``0`` or ``15``."""
    k, n, groups = spec.in_features, spec.out_features, spec.groups
    codes = torch.randint(0, 16, (k, n), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.002).half()
    if not spec.zero_point:
        points = torch.full((groups, n), 8, dtype=torch.uint8)
    elif zeros == "random":
        points = torch.randint(0, 16, (groups, n), generator=generator, dtype=torch.uint8)
    else:
        points = torch.full((groups, n), int(zeros), dtype=torch.uint8)
    return Codes(codes, points, scales)


def sample(spec: LinearSpec, rows: int, seed: int = 0, zeros: str = "random", device: str = "cpu") -> Sample:
    """A weight for ``spec`` (without its experts) and ``rows`` activations of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = random_codes(spec, generator, zeros)
    x = torch.randn(rows, spec.in_features, generator=generator).to(getattr(torch, spec.dtype))
    return _sample(spec, codes, x, device)


def cancelling_sample(spec: LinearSpec, rows: int, device: str = "cpu") -> Sample:
    """Sums that pass through about 100 000, beyond float16's range, and end near 0.

    A kernel that accumulates in float16 gives inf here, or loses the small terms; float32 does not notice.
    """
    k, n = spec.in_features, spec.out_features
    generator = torch.Generator().manual_seed(1)
    codes = Codes(
        torch.full((k, n), 12, dtype=torch.uint8),
        torch.full((spec.groups, n), 8, dtype=torch.uint8),
        torch.ones(spec.groups, n, dtype=torch.float16),
    )
    half = k // 2
    x = torch.randn(rows, k, generator=generator)
    x[:, :half] += 100_000 / (4 * half)
    x[:, half : 2 * half] -= 100_000 / (4 * half)
    return _sample(spec, codes, x.to(getattr(torch, spec.dtype)), device)


def _sample(spec: LinearSpec, codes: Codes, x: torch.Tensor, device: str) -> Sample:
    one = replace(spec, experts=0)
    layout = checkpoint_layout(spec.layout)
    tensors = {name: tensor.to(device) for name, tensor in layout.pack(codes).items()}
    # The stored form is the truth: a layout with scaled zeros has rounded them.
    stored = layout.unpack(tensors, one.in_features, one.out_features, one.group_size)
    weight = dequantize(stored, torch.float64).cpu()
    x64 = x.to(torch.float64)
    return Sample(one, tensors, x.to(device), x64 @ weight, x64.abs() @ weight.abs())


def guarded(tensor: torch.Tensor, fill: int) -> torch.Tensor:
    """A copy of ``tensor`` that lies inside a larger buffer of garbage (bytes of value ``fill``)."""
    width = tensor.element_size()
    flat = torch.full(((tensor.numel() + 2 * GUARD) * width,), fill, dtype=torch.uint8, device=tensor.device)
    inside = flat[GUARD * width : (GUARD + tensor.numel()) * width].view(tensor.dtype).view(tensor.shape)
    return inside.copy_(tensor)
