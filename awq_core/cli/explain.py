"""``awq explain``: which kernel each linear of a checkpoint gets, and why not the others."""

from __future__ import annotations

from typing import Annotated

import typer

from ._options import AsJson, CheckpointPath, DtypeOption, VersionOption


def explain(
    path: CheckpointPath,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            help="Device to plan for, in this machine or imagined: cpu, cpu:avx2, cuda:sm90, hip:gfx942, mps. "
            "Left out: this machine's.",
            show_default=False,
        ),
    ] = None,
    version: VersionOption = None,
    dtype: DtypeOption = None,
    rows: Annotated[
        int | None,
        typer.Option(metavar="M", min=1, help="Only for this number of rows (batch x sequence).", show_default=False),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every refusal in every range of M.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which kernel each linear of a checkpoint gets, and why not the others.

    One line per distinct linear: the kernel for each range of M, how the weight lies in memory and what that takes.
    Then the kernels that were not chosen, with all reasons. No weight is read and no GPU is needed.
    """
    from ._checkpoint import linears, open_checkpoint, taken_dtype
    from ._device import wanted_device
    from ._output import console, print_json
    from ._plans import (
        band_at,
        chosen_table,
        full_text,
        not_chosen,
        not_chosen_table,
        plan_all,
        planned_data,
        requested,
    )

    opened = open_checkpoint(path)
    target, imagined = wanted_device(device)
    chosen_dtype = dtype or taken_dtype(opened, target)
    planned = plan_all(linears(opened, chosen_dtype, target), requested(version), imagined)
    if as_json:
        found = [planned_data(item) for item in planned]
        if rows is not None:
            for data, item in zip(found, planned, strict=True):
                data["at_rows"] = {"rows": rows, "kernel": band_at(item.plan, rows).candidate.name}
        print_json(
            {
                "path": str(path),
                "device": str(target),
                "imagined": imagined,
                "dtype": chosen_dtype,
                "version": version,
                "linears": found,
            }
        )
        return
    out = console()
    where = f"{target} (imagined: nothing was probed)" if imagined else str(target)
    out.print(f"{path} on {where} in {chosen_dtype}\n")
    out.print(chosen_table(planned, rows))
    if verbose:
        out.print("\n\n".join(full_text(item) for item in planned), soft_wrap=True)
    elif not_chosen(planned, rows):
        out.print(not_chosen_table(planned, rows))
