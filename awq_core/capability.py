"""What a kernel declares: boxes of the problem space in which it is right, and how a problem is checked against one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .guard import is_count, require
from .spec import LinearSpec, Rows


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a kernel does not take a problem: the rule that failed, what it wants and what it got."""

    rule: str
    wanted: str
    got: str

    def __str__(self) -> str:
        return f"{self.rule}: wants {self.wanted}, got {self.got}"


@dataclass(frozen=True, slots=True)
class Capability:
    """One box of the problem space. A field that is empty or None sets no limit.

    ``device`` is torch's device type; ``vendors`` and ``archs`` narrow it. ``layouts`` are the checkpoint layouts that
    the kernel's resident layout can be made from. ``group_multiple`` admits every g that it divides, besides
    ``group_sizes``. ``in_multiple`` and ``out_multiple`` must divide K and N. ``rows`` is the range of M.
    ``zero_points`` and ``dtypes`` list what is computed right. ``compile_safe`` declares that the kernel may run under
    ``torch.compile`` and CUDA-graph capture. (A gradient for x is core's: it dequantizes any resident layout.)
    ``tested`` names the architectures on which the conformance kit was run on hardware.

    ``priority`` orders the kernels that take a problem, the highest first: 0-99 reference, 100-199 portable,
    200-299 tuned for the device. It is open at the top: a third party may outrank a built-in.

    ValueError where a field has a wrong type or a number that makes no sense.
    """

    device: str
    layouts: frozenset[str]
    dtypes: frozenset[str]
    priority: int
    vendors: frozenset[str] = frozenset()
    archs: frozenset[str] = frozenset()
    rows: Rows = field(default=Rows())
    group_sizes: frozenset[int] = frozenset()
    group_multiple: int | None = None
    in_multiple: int = 1
    out_multiple: int = 1
    in_features: Rows = field(default=Rows())
    out_features: Rows = field(default=Rows())
    zero_points: frozenset[bool] = frozenset({True, False})
    compile_safe: bool = True
    tested: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        def all_of(kind: type, *fields: str) -> None:
            for name in fields:
                value = getattr(self, name)
                ok = isinstance(value, frozenset) and all(isinstance(item, kind) for item in value)
                require(ok, f"Capability.{name}", f"a frozenset of {kind.__name__}", value)

        require(isinstance(self.device, str), "Capability.device", 'a device type or "*"', self.device)
        all_of(str, "layouts", "dtypes", "vendors", "archs", "tested")
        all_of(int, "group_sizes")
        all_of(bool, "zero_points")
        whole = isinstance(self.priority, int) and not isinstance(self.priority, bool)
        require(whole, "Capability.priority", "a whole number", self.priority)
        for name in ("rows", "in_features", "out_features"):
            require(isinstance(getattr(self, name), Rows), f"Capability.{name}", "Rows", getattr(self, name))
        for name in ("in_multiple", "out_multiple", "group_multiple"):
            value = getattr(self, name)
            ok = is_count(value) or (name == "group_multiple" and value is None)
            require(ok, f"Capability.{name}", "a whole number of at least 1", value)
        require(isinstance(self.compile_safe, bool), "Capability.compile_safe", "True or False", self.compile_safe)


def check(capability: Capability, spec: LinearSpec, m: int | None = None) -> tuple[Reason, ...]:
    """All the reasons why ``spec`` lies outside ``capability`` (none: it is inside); M is left out when it is None."""
    reasons: list[Reason] = []

    def want(ok: bool, rule: str, wanted: Any, got: Any) -> None:
        if not ok:
            reasons.append(Reason(rule, str(wanted), str(got)))

    device = spec.device
    want(capability.device in ("*", device.type), "device", device_text(capability), device.type)
    if capability.device in ("*", device.type):
        want(
            not capability.vendors or device.vendor in capability.vendors,
            "vendor",
            one_of(capability.vendors),
            device.vendor,
        )
        want(not capability.archs or device.arch in capability.archs, "arch", one_of(capability.archs), device.arch)
    want(not capability.layouts or spec.layout in capability.layouts, "layout", one_of(capability.layouts), spec.layout)
    want(not capability.dtypes or spec.dtype in capability.dtypes, "dtype", one_of(capability.dtypes), spec.dtype)
    want(group_accepted(capability, spec.group_size), "group_size", groups_text(capability), spec.group_size)
    want(
        spec.in_features % capability.in_multiple == 0,
        "in_features",
        f"a multiple of {capability.in_multiple}",
        spec.in_features,
    )
    want(
        spec.out_features % capability.out_multiple == 0,
        "out_features",
        f"a multiple of {capability.out_multiple}",
        spec.out_features,
    )
    want(spec.in_features in capability.in_features, "in_features", capability.in_features, spec.in_features)
    want(spec.out_features in capability.out_features, "out_features", capability.out_features, spec.out_features)
    want(
        not capability.zero_points or spec.zero_point in capability.zero_points,
        "zero_point",
        one_of(frozenset(map(str, capability.zero_points))),
        spec.zero_point,
    )
    if m is not None:
        want(m in capability.rows, "rows", f"M {capability.rows}", m)
    return tuple(reasons)


def group_accepted(capability: Capability, group_size: int) -> bool:
    """Whether the record admits this (resolved) group size."""
    if not capability.group_sizes and capability.group_multiple is None:
        return True
    if group_size in capability.group_sizes:
        return True
    return capability.group_multiple is not None and group_size % capability.group_multiple == 0


def device_text(capability: Capability) -> str:
    """The record's device in words: ``an NVIDIA or AMD GPU`` for torch's cuda."""
    if capability.device != "cuda":
        return capability.device
    makers = [maker.upper() for maker in ("nvidia", "amd") if not capability.vendors or maker in capability.vendors]
    return f"an {' or '.join(makers)} GPU" if makers else "cuda"


def groups_text(capability: Capability) -> str:
    """The group sizes of a record in words."""
    words = [str(g) for g in sorted(capability.group_sizes)]
    if capability.group_multiple is not None:
        words.append(f"a multiple of {capability.group_multiple}")
    return " or ".join(words) if words else "any"


def one_of(values: frozenset[str]) -> str:
    """``a, b or c``, sorted, for messages."""
    words = sorted(values)
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1] if words else "any"
