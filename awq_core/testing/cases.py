"""Cases drawn from a kernel's own records: the cells that it declares, and the nearest ones that it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..capability import Capability, check, group_accepted
from ..kernel import Backend, Kernel
from ..layouts import NAMES, checkpoint_layout
from ..spec import Device, LinearSpec

GROUPS = (16, 32, 48, 64, 96, 128, 192, 256)
DTYPES = ("float32", "float16", "bfloat16")
SWEEP = tuple(range(1, 35))
FAR_ROWS = (63, 64, 65, 127, 128, 129, 200, 257)
USUAL = {"nvidia": ("sm80", "sm90"), "amd": ("gfx942", "gfx1100")}


@dataclass(frozen=True)
class Case:
    """One cell: a kernel, the record that declares it, a problem inside that record, and a number of rows."""

    backend: Backend
    kernel: Kernel
    record: int
    spec: LinearSpec
    rows: int

    @property
    def capability(self) -> Capability:
        """The record."""
        return self.kernel.capabilities[self.record]

    def __str__(self) -> str:
        spec = self.spec
        shape = f"K{spec.in_features}-N{spec.out_features}-g{spec.group_size}-M{self.rows}"
        zero = "" if spec.zero_point else "-sym"
        return f"{self.kernel.name}[{self.record}]-{spec.dtype}-{spec.layout}-{shape}{zero}-{spec.device}"


def devices(capability: Capability, local: Device) -> list[Device]:
    """The devices of a record: this machine's, where the record has it, else those that it names."""
    fits = capability.device in ("*", local.type)
    fits = fits and (not capability.vendors or local.vendor in capability.vendors)
    if fits and (not capability.archs or local.arch in capability.archs):
        return [local]
    if capability.device == "cuda":
        return architectures(capability)
    vendors, archs = sorted(capability.vendors) or ["any"], sorted(capability.archs) or ["generic"]
    return [Device(capability.device, vendor, arch) for vendor in vendors for arch in archs]


def architectures(record: Capability) -> list[Device]:
    """The GPUs of a record: those that it names, else two of each vendor that it admits."""
    if record.device != "cuda":
        return []
    vendors = record.vendors or {"nvidia", "amd"}
    usual = [arch for vendor in ("nvidia", "amd") for arch in USUAL[vendor]]
    found = [(("amd" if a.startswith("gfx") else "nvidia"), a) for a in sorted(record.archs) or usual]
    return [Device("cuda", vendor, arch) for vendor, arch in found if vendor in vendors]


def declared(backend: Backend, local: Device) -> Iterator[Case]:
    """Cells inside the records: each dtype, layout and group size at the smallest shape, then other shapes and rows."""
    for kernel in backend.kernels:
        for number, record in enumerate(kernel.capabilities):
            rows = record.rows.first
            specs = [spec for device in devices(record, local)[:1] for spec in cells(record, device)]
            for spec in specs:
                yield Case(backend, kernel, number, spec, rows)
            for spec in _one_per_dtype(specs):
                yield from (Case(backend, kernel, number, s, rows) for s in _other_shapes(record, spec))
                edges = {record.rows.first + 1, record.rows.last or 1, (record.rows.last or 2) - 1, *SWEEP, *FAR_ROWS}
                for m in sorted(edges - {rows}):
                    if m in record.rows and m < 1024:
                        yield Case(backend, kernel, number, spec, m)


def outside(case: Case) -> Iterator[tuple[str, LinearSpec, int]]:
    """The nearest points outside a case's record, one rule broken at a time: (rule, problem, rows)."""
    record, spec = case.capability, case.spec
    if record.rows.first > 1:
        yield "rows", spec, record.rows.first - 1
    if record.rows.last is not None:
        yield "rows", spec, record.rows.last + 1
    if record.dtypes:
        for dtype in set(DTYPES) - record.dtypes:
            yield "dtype", replace(spec, dtype=dtype), case.rows
    if record.layouts:
        for layout in set(NAMES) - record.layouts:
            yield "layout", replace(spec, layout=layout, zero_point=layout != "marlin"), case.rows
    if record.out_multiple > 1:
        yield "out_features", replace(spec, out_features=spec.out_features + record.out_multiple // 2), case.rows
    if record.in_multiple > 1:
        k = spec.in_features + record.in_multiple // 2
        yield "in_features", replace(spec, in_features=k, group_size=k), case.rows
    for group in GROUPS:
        if not group_accepted(record, group):
            yield (
                "group_size",
                replace(spec, group_size=group, in_features=math.lcm(group, record.in_multiple)),
                case.rows,
            )
    for value in {True, False} - record.zero_points:
        yield "zero_point", replace(spec, zero_point=value), case.rows


def cells(record: Capability, device: Device) -> Iterator[LinearSpec]:
    """Each dtype, layout, kind of zero point and group size of a record, at the smallest shape that shows faults."""
    layouts = [name for name in NAMES if not record.layouts or name in record.layouts]
    dtypes = [name for name in DTYPES if not record.dtypes or name in record.dtypes]
    groups = sorted({*(g for g in GROUPS if group_accepted(record, g)), *record.group_sizes})
    for layout in layouts:
        for zero_point in sorted(checkpoint_layout(layout).zero_points & record.zero_points, reverse=True):
            for group in groups:
                # Three groups: with a single one a kernel that mistakes the group size would still be right.
                k = 3 * math.lcm(group, record.in_multiple, 64 if layout in ("gemv_fast", "llm_awq", "marlin") else 1)
                k *= max(1, math.ceil(record.in_features.first / k))
                n = math.lcm(record.out_multiple, 64 if layout == "marlin" else 8)
                n *= max(1, math.ceil(record.out_features.first / n))
                for dtype in dtypes:
                    spec = LinearSpec(k, n, group, layout, zero_point, dtype=dtype, device=device)
                    if checkpoint_layout(layout).refuses(k, n, group) is None and not check(record, spec):
                        yield spec


def _one_per_dtype(specs: list[LinearSpec]) -> list[LinearSpec]:
    middle: dict[str, LinearSpec] = {}
    for spec in sorted(specs, key=lambda s: (s.layout != specs[0].layout, abs(s.group_size - 64))):
        middle.setdefault(spec.dtype, spec)
    return list(middle.values())


def _other_shapes(record: Capability, spec: LinearSpec) -> Iterator[LinearSpec]:
    """Odd counts of tiles and groups, a tall and a wide weight, one column of groups."""
    k, n = spec.in_features, spec.out_features
    for in_features, out_features, group in (
        (3 * k, 3 * n, spec.group_size),
        (k, 7 * n, spec.group_size),
        (5 * k, n, spec.group_size),
        (16 * k, 5 * n, spec.group_size),
        (4 * k, 2 * n, 4 * k),
    ):
        other = replace(spec, in_features=in_features, out_features=out_features, group_size=group)
        if checkpoint_layout(spec.layout).refuses(in_features, out_features, group) is None and not check(
            record, other
        ):
            yield other
