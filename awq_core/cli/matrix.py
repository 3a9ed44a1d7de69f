"""``awq matrix``: docs/matrix.md, written from what the built-in backends declare."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ._errors import fail

if TYPE_CHECKING:
    from ..plugins import Registry

T = TypeVar("T")
CPUS = ("cpu:avx512", "cpu:avx2", "cpu:generic")
GPUS = (
    *(f"cuda:sm{arch}" for arch in (75, 80, 86, 89, 90, 100, 120)),
    *(f"hip:{arch}" for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")),
    "mps",
)
DTYPES = ("bfloat16", "float16", "float32")
FEATURES = 4096
HEAD = f"""# Which kernel runs where

Written by `awq matrix` from what the built-in backends declare; do not edit it by hand. One linear of K = {FEATURES}
inputs and N = {FEATURES} outputs; M is the number of rows (batch x sequence). A cell gives the kernel for each range of
M, then how the weight lies in memory: as it is stored (about 0.52 bytes a weight), or in a layout of the backend's own
with its bytes a weight (dense bfloat16 has 2). Devices and layouts with equal rows share one.
`awq explain PATH --device DEVICE` answers for a real checkpoint, with the reasons against every other kernel.
"""


def matrix(
    path: Annotated[Path, typer.Option("--path", metavar="FILE", help="The document to write or to check.")] = Path(
        "docs/matrix.md"
    ),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 where the document is not up to date.")
    ] = False,
) -> None:
    """Write docs/matrix.md: devices x layouts x dtypes, and the kernels that the built-in backends take for them."""
    text = document(built_in())
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path} is written")
    elif not path.is_file() or path.read_text("utf-8") != text:
        typer.echo(f"{path} is not up to date: run `awq matrix`", err=True)
        raise typer.Exit(1)
    else:
        print(f"{path} is up to date")


def built_in() -> Registry:
    """The registry without third-party plugins, so that the document is the same on every machine."""
    from .. import plugins

    points = [point for group in plugins.GROUPS for point in importlib.metadata.entry_points(group=group)]
    found = plugins.load(points, allow="")
    if found.failures:
        fail("; ".join(f"{failure.source} could not be loaded: {failure.error}" for failure in found.failures))
    return found


def document(found: Registry) -> str:
    """The whole text."""
    parts = [HEAD]
    for title, devices, group_size in (
        ("CPU, group_size 128", CPUS, 128),
        ("CPU, group_size 64", CPUS, 64),
        ("GPU, group_size 128", GPUS, 128),
    ):
        parts.append(f"## {title}\n")
        parts.append(_table(found, devices, group_size))
    return "\n".join(parts)


def _table(found: Registry, devices: Iterable[str], group_size: int) -> str:
    """A table of devices and layouts against dtypes, equal rows joined: first layouts of a device, then devices."""
    from ..layouts import NAMES

    by_device: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {}
    for device in devices:
        found_cells = {layout: tuple(cell(found, device, layout, d, group_size) for d in DTYPES) for layout in NAMES}
        by_device[device] = tuple(_joined(found_cells).items())
    lines = ["| device | stored as | " + " | ".join(DTYPES) + " |", "|" + " --- |" * (2 + len(DTYPES))]
    for names, rows in _joined(by_device).items():
        for number, (layouts, cells) in enumerate(rows):
            lines.append(f"| {names if number == 0 else ''} | {layouts} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _joined(values: Mapping[str, T]) -> dict[str, T]:
    """The same with keys of equal values joined by commas."""
    keys: dict[T, list[str]] = {}
    for key, value in values.items():
        keys.setdefault(value, []).append(key)
    return {", ".join(names): value for value, names in keys.items()}


def cell(found: Registry, device: str, layout: str, dtype: str, group_size: int) -> str:
    """The plan for one problem in a few words, or why there is none."""
    from .. import dispatch
    from ..errors import NoKernelError
    from ..reference import BACKEND as REFERENCE
    from ..request import Request
    from ..spec import Device, LinearSpec

    spec = LinearSpec(FEATURES, FEATURES, group_size, layout, layout != "marlin", False, dtype, Device.parse(device))
    try:
        plan = dispatch.make_plan(spec, list(found.backends.values()), found.layouts, Request(), None, REFERENCE)
    except NoKernelError:
        return "none"
    kernels = ", ".join(f"M {band.rows}: `{band.candidate.name}`" for band in plan.bands)
    if len(plan.bands) == 1:
        kernels = f"`{plan.bands[0].candidate.name}`"
    if plan.resident.name == layout:
        return f"{kernels}; as stored"
    return f"{kernels}; {plan.resident.name}, {plan.resident.nbytes(spec) / FEATURES**2:.2f} B"
