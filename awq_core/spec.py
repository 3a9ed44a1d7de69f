"""The problem of one quantized linear as plain data: no torch is imported to ask about it.

Notation everywhere: K = in_features, N = out_features, g = group_size, M = rows of the activation (batch x sequence).
Dtypes are the names that torch prints: ``"float16"``, ``"bfloat16"``, ``"float32"``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ConfigError
from .guard import is_count, require

if TYPE_CHECKING:
    import torch

CPU_ARCHS = ("generic", "avx2", "avx512")


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """A device, real or imagined: ``Device("cuda", "nvidia", "sm90")`` can be asked about on a laptop.

    ``type`` is torch's device type (AMD GPUs are ``"cuda"`` there too), ``vendor`` is nvidia, amd, apple, intel or any,
    ``arch`` is ``sm90``, ``gfx942``, ``avx512`` and so on (what the kernels are compiled for).
    """

    type: str
    vendor: str = "any"
    arch: str = "generic"

    @classmethod
    def parse(cls, text: str) -> Device:
        """Read ``cpu``, ``cpu:avx512``, ``cuda:sm90``, ``hip:gfx942`` or ``mps``; ConfigError otherwise."""
        kind, colon, arch = text.strip().lower().partition(":")
        if kind == "cpu" and arch in (CPU_ARCHS if colon else ("",)):
            return cls("cpu", "any", arch or local_cpu_arch())
        if kind == "cuda" and re.fullmatch(r"sm[0-9]{2,3}", arch):
            return cls("cuda", "nvidia", arch)
        if kind in ("hip", "rocm") and re.fullmatch(r"gfx[0-9a-f]{3,5}", arch):
            return cls("cuda", "amd", arch)
        if kind == "mps" and not colon:
            return cls("mps", "apple")
        raise ConfigError(
            f"device {text!r} is not understood: "
            "write cpu, cpu:avx512, cpu:avx2, cpu:generic, cuda:sm90, hip:gfx942 or mps"
        )

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The Device of a real torch device (asks the driver for the architecture, once per device)."""
        index = device.index
        if device.type == "cuda" and index is None:  # the current device may change, so it is no key to remember by
            import torch

            index = torch.cuda.current_device()
        return _describe(device.type, index)

    def __str__(self) -> str:
        kind = "hip" if self.vendor == "amd" else self.type
        return kind if self.arch == "generic" and self.type != "cpu" else f"{kind}:{self.arch}"


@functools.cache
def local_cpu_arch() -> str:
    """The best instruction set that torch's CPU kernels use here: avx512, avx2 or generic."""
    import torch

    name = str(torch.backends.cpu.get_cpu_capability()).lower()
    return name if name in CPU_ARCHS else "generic"


@functools.cache
def _describe(kind: str, index: int | None) -> Device:
    import torch

    if kind == "cpu":
        return Device("cpu", "any", local_cpu_arch())
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip is not None:
            return Device("cuda", "amd", str(properties.gcnArchName).split(":")[0])
        return Device("cuda", "nvidia", f"sm{properties.major}{properties.minor}")
    vendor = {"mps": "apple", "xpu": "intel"}.get(kind, "any")
    return Device(kind, vendor)


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """What has to be computed by one module: ``y[M, N] = x[M, K] @ w[K, N] + bias``, w in 4 bits.

    ``group_size`` is resolved (a checkpoint's -1 is K here). ``layout`` is the checkpoint layout of the weight.
    ``dtype`` is the activation's. ``experts`` is 0 for a plain linear, else the number of stacked expert weights.
    """

    in_features: int
    out_features: int
    group_size: int
    layout: str = "gemm"
    zero_point: bool = True
    bias: bool = False
    dtype: str = "float16"
    device: Device = field(default=Device("cpu"))
    experts: int = 0

    @property
    def groups(self) -> int:
        """Number of groups along K."""
        return self.in_features // self.group_size

    def __str__(self) -> str:
        return (
            f"K={self.in_features} N={self.out_features} g={self.group_size} {self.layout} "
            f"{self.dtype} on {self.device}" + (f" x{self.experts} experts" if self.experts else "")
        )


@dataclass(frozen=True, slots=True, order=True)
class Rows:
    """A range of M, both ends included; ``last=None`` has no upper end. ValueError where it is no range."""

    first: int = 1
    last: int | None = None

    def __post_init__(self) -> None:
        require(is_count(self.first), "Rows.first", "a whole number of at least 1", self.first)
        ok = self.last is None or (is_count(self.last) and self.last >= self.first)
        require(ok, "Rows.last", "None or a whole number not below first", self.last)

    def __contains__(self, m: object) -> bool:
        return isinstance(m, int) and self.first <= m and (self.last is None or m <= self.last)

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first}+"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
