"""``awq tune``: measure the kernels' configs on the GPU of this machine, and keep the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._options import AsJson, DtypeOption, VersionOption

if TYPE_CHECKING:
    from collections import Counter

    from ..spec import Device, LinearSpec

# K x N of Llama-3-8B and Mistral-7B: qkv, o, gate and up, down
USUAL = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
MOST = 256


def tune(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="Folder of an AWQ checkpoint. Left out: the linears of Llama-3-8B."),
    ] = None,
    version: VersionOption = None,
    dtype: DtypeOption = None,
    most: Annotated[
        int, typer.Option("--rows", metavar="M", min=1, help="Measure up to this number of rows (batch x sequence).")
    ] = MOST,
    as_json: AsJson = False,
) -> None:
    """Measure the GPU kernels on the linears of a checkpoint, and remember the fastest way to run each.

    Without PATH the linears of Llama-3-8B are measured. Results lie in the user's cache folder (AWQ_CORE_CACHE names
    another one), one file a GPU, and are looked up when a model is loaded; nothing is ever measured then. Takes
    minutes; Ctrl-C keeps what was found so far.
    """
    import torch

    from .. import tuning
    from ..errors import ConfigError
    from ..spec import Device
    from ._output import console, print_json, table
    from ._plans import plan_all, requested
    from ._tuning import gpu_timer, jobs_of, search

    if not torch.cuda.is_available():
        raise ConfigError("awq tune measures on a GPU, and torch sees none in this machine")
    place = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(place)
    specs = _specs(path, dtype, Device.of(place))
    planned = plan_all(specs, requested(version))
    notes = console(stderr=True)
    found: list[tuning.Measured] = []
    for item in planned:
        jobs = jobs_of(item.plan, most)
        time = gpu_timer(item.plan, place) if jobs else None
        new = []
        for job in jobs:
            assert time is not None
            new.append(search(job, time))
            notes.print(
                f"{new[-1].kernel} {item.plan.spec} M={job.rows}: {new[-1].us:.1f} us, was {new[-1].default_us:.1f}"
            )
        if new:
            tuning.write(name, new)
        found += new
    if as_json:
        from dataclasses import asdict

        print_json({"device": name, "path": str(tuning.path_for(name)), "measured": [asdict(one) for one in found]})
        return
    if not found:
        kernels = sorted({band.candidate.name for item in planned for band in item.plan.bands})
        print(f"nothing to tune: {', '.join(kernels)} run in one way only")
        return
    rows = [
        (
            m.kernel,
            f"{m.in_features} x {m.out_features} g={m.group_size}",
            m.dtype,
            m.rows,
            f"{m.default_us:.1f}",
            f"{m.us:.1f}",
            ", ".join(f"{name}={value}" for name, value in m.config.items()) or "the default",
        )
        for m in found
    ]
    out = console()
    out.print(table(f"Measured on {name}", "kernel | K x N | dtype | >M | >default us | >best us | config", rows))
    out.print(f"kept in {tuning.path_for(name)}")


def _specs(path: Path | None, dtype: str | None, device: Device) -> Counter[LinearSpec]:
    from collections import Counter

    from ..spec import LinearSpec
    from ._checkpoint import linears, open_checkpoint, taken_dtype

    if path is None:
        return Counter(LinearSpec(k, n, 128, dtype=dtype or "float16", device=device) for k, n in USUAL)
    opened = open_checkpoint(path)
    return linears(opened, dtype or taken_dtype(opened, device), device)
