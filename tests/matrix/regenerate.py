"""The golden matrix, docs/plans.md: which plan each problem gets. ``python tests/matrix/regenerate.py`` writes it.

The devices are invented, so it is the same on every machine; third-party plugins are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from awq_core import dispatch
from awq_core.cli.matrix import built_in
from awq_core.layouts import NAMES, checkpoint_layout
from awq_core.plugins import Registry
from awq_core.reference import BACKEND as REFERENCE
from awq_core.request import Request
from awq_core.spec import Device, LinearSpec

PATH = Path(__file__).parents[2] / "docs" / "plans.md"
DEVICES = {
    "T4": "cuda:sm75",
    "A100": "cuda:sm80",
    "L4": "cuda:sm89",
    "H100": "cuda:sm90",
    "B200": "cuda:sm100",
    "RTX 5090": "cuda:sm120",
    "MI250": "hip:gfx90a",
    "MI300X": "hip:gfx942",
    "RX 7900": "hip:gfx1100",
    "CPU with AVX-512": "cpu:avx512",
    "CPU with AVX2": "cpu:avx2",
    "CPU, any other": "cpu:generic",
    "MPS": "mps",
}
DTYPES = ("float16", "bfloat16", "float32")
GROUPS = (16, 32, 64, 128, -1)
ROWS = (1, 16, 64, 512)
FEATURES = 4096
HEAD = f"""# Every plan

The golden matrix of the tests: written by `python tests/matrix/regenerate.py`, not by hand; a change of it is a change
of what users get, to be read as such. One linear of K = {FEATURES} inputs and N = {FEATURES} outputs, with the built-in
backends; a group size of -1 is one group for all of K. Lines that say the same are joined. What a checkpoint layout
cannot hold (gemv with groups of 16) is left out.
"""


def problems() -> Iterator[tuple[str, str, str, int, LinearSpec]]:
    """(device's name, dtype, layout, group size as stored, spec) of every cell that a checkpoint can hold."""
    for device, text in DEVICES.items():
        for dtype in DTYPES:
            for layout in NAMES:
                for stored in GROUPS:
                    group = FEATURES if stored == -1 else stored
                    if checkpoint_layout(layout).refuses(FEATURES, FEATURES, group) is None:
                        zero_point = True in checkpoint_layout(layout).zero_points
                        where = Device.parse(text)
                        spec = LinearSpec(FEATURES, FEATURES, group, layout, zero_point, False, dtype, where)
                        yield device, dtype, layout, stored, spec


def make_plan(found: Registry, spec: LinearSpec, request: Request | None = None) -> dispatch.Plan:
    """The plan with the backends of ``found``, nothing probed."""
    return dispatch.make_plan(spec, list(found.backends.values()), found.layouts, request, None, REFERENCE)


def document(found: Registry) -> str:
    """The whole text."""
    tree: dict[str, dict[str, dict[str, dict[str, tuple[str, ...]]]]] = {}
    for device, dtype, layout, group, spec in problems():
        plan = make_plan(found, spec)
        kept = "as stored" if plan.resident.name == layout else plan.resident.name
        kernels = tuple(next(b.candidate.name for b in plan.bands if m in b.rows) for m in ROWS)
        tree.setdefault(device, {}).setdefault(dtype, {}).setdefault(layout, {})[str(group)] = (kept, *kernels)
    columns = ("dtype", "stored as", "group_size", "in memory", *(f"M = {m}" for m in ROWS))
    parts = [HEAD]
    for devices, dtypes in _joined(tree):
        parts.append(f"## {devices}\n")
        parts.append("| " + " | ".join(columns) + " |")
        parts.append("|" + " --- |" * len(columns))
        for names, layouts in _joined(dtypes):
            for held, groups in _joined(layouts):
                for sizes, cell in _joined(groups):
                    parts.append("| " + " | ".join((names, held, sizes, *cell)) + " |")
        parts.append("")
    return "\n".join(parts)


def _joined(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    keys: list[tuple[list[str], Any]] = []
    for key, value in values.items():
        same = next((names for names, other in keys if other == value), None)
        if same is None:
            keys.append(([key], value))
        else:
            same.append(key)
    return [(", ".join(names), value) for names, value in keys]


if __name__ == "__main__":
    PATH.write_text(document(built_in()), encoding="utf-8")
    print(f"{PATH} is written")
