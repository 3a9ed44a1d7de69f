"""``awq quantize``: a dense model folder in, an AWQ checkpoint folder out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._options import AsJson

if TYPE_CHECKING:
    from rich.console import Console


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a dense model: config.json and weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must be new or empty.")],
    group_size: Annotated[
        int, typer.Option(help="Weights along in_features that share a scale; it must divide in_features. -1: all.")
    ] = 128,
    layout: Annotated[
        Literal["gemm", "gemv", "gemv_fast"], typer.Option(help="Checkpoint layout. Every loader reads gemm.")
    ] = "gemm",
    dtype: Annotated[
        Literal["float16", "bfloat16"], typer.Option(help="Dtype of the tensors that stay dense.")
    ] = "float16",
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave modules dense whose name contains NAME. May be repeated."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a dense model to 4 bits and write an AWQ checkpoint.

    For now by rounding to nearest: no calibration, seconds instead of minutes, less accurate than AWQ's search for
    scales. The checkpoint loads in awq-core, AutoAWQ, transformers, vLLM and SGLang. The output embedding stays dense.
    A run that fails leaves nothing behind.
    """
    from ._output import console, print_json, size, table

    report = run(
        console(stderr=True),
        model,
        out,
        group_size=group_size,
        layout=layout,
        dtype=dtype,
        modules_to_not_convert=skip or (),
        overwrite=overwrite,
    )
    if as_json:
        print_json(asdict(report) | {"out": str(report.out)})
        return
    ratio = report.bytes_after / report.bytes_before
    screen = console()
    screen.print(f"{report.out} is written in {report.seconds:.1f} s")
    screen.print(
        table(
            "Weights",
            "| ",
            [
                ("quantized modules", report.quantized),
                ("dense tensors", report.dense),
                ("before", size(report.bytes_before)),
                ("after", f"{size(report.bytes_after)} ({ratio:.2f} of before)"),
            ],
        )
    )
    if report.skipped:
        screen.print(table("Linears left dense", "module | why", report.skipped))


def run(screen: Console, model: Path, out: Path, **options: Any) -> Any:
    """``awq_core.hf.quantize.quantize`` with a progress bar on ``screen``; returns its report."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    from ..hf.quantize import quantize as quantize_model

    columns: tuple[ProgressColumn, ...] = (
        TextColumn("quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    columns += (TextColumn("{task.fields[name]}"),)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=None, name="")

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, name=name)

        return quantize_model(model, out, progress=progress, **options)
