"""``awq quantize MODEL OUT``: an AWQ checkpoint from a dense model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._errors import interrupted
from ._options import AsJson

if TYPE_CHECKING:
    from rich.console import Console


def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a dense model: config.json and weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; new or empty, or --overwrite.")],
    method: Annotated[
        Literal["awq", "rtn"], typer.Option(help="awq searches on calibration text; rtn rounds to nearest, in seconds.")
    ] = "awq",
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Inputs that share a scale; -1: all of them. "
            "Left out: 128, or the largest of 64, 32 and 16 that divides the inputs of every linear.",
            show_default=False,
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Fix the zero points at 8 (layout gemm only); less accurate.")
    ] = False,
    layout: Annotated[
        Literal["gemm", "gemv", "gemv_fast"],
        typer.Option(help="How the bytes lie in the file; every loader reads gemm."),
    ] = "gemm",
    dtype: Annotated[
        Literal["float16", "bfloat16"], typer.Option(help="Dtype of the tensors that stay dense.")
    ] = "float16",
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave modules dense whose name contains NAME. May be repeated."),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Calibration text: txt, md, json, jsonl or parquet. Best is text like that which the model will read. "
            "Left out: a small English text that travels with awq-core.",
            show_default=False,
        ),
    ] = None,
    calib_samples: Annotated[int, typer.Option(min=1, help="Number of windows of calibration text.")] = 32,
    calib_length: Annotated[int, typer.Option(min=8, help="Tokens in each window.")] = 512,
    seed: Annotated[int, typer.Option(help="Draws other windows of the text.")] = 0,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Where blocks are calibrated, one at a time: cpu, cuda, cuda:1. The model stays on the CPU.",
        ),
    ] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was killed, at the block where it was.")
    ] = False,
    export_dense: Annotated[
        bool,
        typer.Option("--export-dense", help="Write the dense model with the scales folded in, for other quantizers."),
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The search as the paper has it: no error feedback, q and k unclipped.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where a model lies there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a dense model to 4 bits with AWQ and write the checkpoint.

    It loads in awq-core, AutoAWQ, transformers, vLLM and SGLang. The output embedding stays dense. A report with the
    loss of each layer lies in OUT/awq_report.json. A run that fails leaves OUT as it was; what it had finished lies
    beside OUT for --resume.
    """
    from ._output import console, print_json, size, table

    options: dict[str, Any] = {}
    if method == "awq":
        options = {
            "calib": calib,
            "calib_samples": calib_samples,
            "calib_length": calib_length,
            "seed": seed,
            "device": device,
            "resume": resume,
            "export_dense": export_dense,
        }
        if paper:
            from ..quantization.settings import PAPER

            options |= PAPER
    elif calib or resume or export_dense or paper:
        from ..errors import ConfigError

        raise ConfigError("--method rtn takes no calibration: leave --calib, --resume, --export-dense and --paper out")
    report = run(
        console(stderr=True),
        model,
        out,
        method=method,
        group_size=group_size,
        zero_point=not symmetric,
        layout=layout,
        dtype=dtype,
        modules_to_not_convert=skip or (),
        overwrite=overwrite,
        **options,
    )
    if as_json:
        from ..hf.quantize import report_data

        print_json(report_data(report))
        return
    ratio = report.bytes_after / report.bytes_before
    screen = console()
    screen.print(f"{report.out} is written in {report.seconds:.1f} s")
    screen.print(
        table(
            "Weights",
            "| ",
            [
                ("method", "awq, the scales alone" if export_dense else report.method),
                ("quantized modules", report.quantized),
                ("group size", report.group_size),
                ("dense tensors", report.dense),
                ("before", size(report.bytes_before)),
                ("after", f"{size(report.bytes_after)} ({ratio:.2f} of before)"),
            ],
        )
    )
    if report.skipped and not export_dense:
        screen.print(table("Linears left dense", "module | why", report.skipped))
    for note in report.notes:
        screen.print(f"note: {note}", soft_wrap=True)


def run(screen: Console, model: Path, out: Path, **options: Any) -> Any:
    """``awq_core.hf.quantize.quantize`` with a progress bar on ``screen``; returns its report."""
    from ..hf.quantize import disable_progress_bar
    from ..hf.quantize import quantize as quantize_model
    from ._progress import progress_bar

    disable_progress_bar()  # ours says more
    try:
        with progress_bar("quantizing", screen) as step:
            return quantize_model(model, out, progress=step, **options)
    except KeyboardInterrupt:
        interrupted(_after_interrupt(out, options.get("method", "awq") == "awq"))


def _after_interrupt(out: Path, resumes: bool) -> str:
    """What Ctrl-C left behind, and how to go on where the method can."""
    from ..quantization.state import GO_ON, finished

    blocks = finished(out) if resumes else 0
    if not blocks:
        return f"interrupted: {out} was not written"
    kept = "1 finished block is kept" if blocks == 1 else f"{blocks} finished blocks are kept"
    return f"interrupted: {out} was not written; {kept}, {GO_ON}"
