"""``awq bench``: the tables of the transformers AWQ guide, for a checkpoint or for a known configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ..errors import ConfigError
from ._bench_tables import as_data, print_report
from ._options import AsJson, Dtype

if TYPE_CHECKING:
    from ..bench.loops import Case

LENGTHS = "32,64,128,256,512,1024,2048"  # the guide's
CPU_LENGTHS = "32,64,128"


def bench(
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="Folder of a checkpoint, AWQ or dense.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Instead of PATH: mistral-7b, llama-3-8b, qwen2.5-7b, yi-34b, mixtral-8x7b or tinyllama, with random "
            "weights made on the device; nothing is downloaded.",
            show_default=False,
        ),
    ] = None,
    fused: Annotated[
        bool | None, typer.Option("--fused/--no-fused", help="Only fused, or only unfused. Left out: both.")
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Measure the dense model of the same shapes too.")
    ] = True,
    batch_size: Annotated[
        list[str] | None, typer.Option(metavar="B,...", help="Batch sizes. Left out: 1.", show_default=False)
    ] = None,
    prefill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P,...", help=f"Prompt lengths. Left out: {LENGTHS}; on a CPU {CPU_LENGTHS}.", show_default=False
        ),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option(
            metavar="D,...",
            help="New tokens, one number for each prompt length or one for all. Left out: as many as the prompt has.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Cut the model of --config to N layers.", show_default=False)
    ] = None,
    group_size: Annotated[int, typer.Option(help="Group size of the model of --config.")] = 128,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:1. Left out: a GPU where there is one.")
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the activations. Left out: float16 on a GPU, bfloat16 on a CPU.", show_default=False
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each figure; the median counts.")] = 3,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the two charts of the guide here, as PNG.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill and decode speed and memory, as the tables of the transformers AWQ guide have them.

    Unfused and fused modules, the dense model, and the floor: the tokens per second that the memory's bandwidth,
    measured in the same run, allows at most. Decode tokens/s is that of `model.generate()`, greedy, without a streamer;
    --json has the raw decode loop beside it. GB are 2^30 bytes, as in the guide.
    """
    if (path is None) == (config is None):
        raise ConfigError("name what to measure: a PATH or --config NAME, one of the two")
    if path is not None and layers is not None:
        raise ConfigError("--layers cuts a --config, not the checkpoint of a PATH")
    sizes = numbers("--batch-size", batch_size) or [1]
    lengths, news = numbers("--prefill", prefill), numbers("--decode", decode)

    from ._progress import progress_bar, starting

    with starting():
        import torch

        from ..bench.machine import pick_device
        from ..bench.models import default_dtype
        from ..bench.plots import pyplot, write_plots
        from ..bench.run import run
        from ..bench.sources import Folder, Named, Variant

    if plot is not None:
        if plot.exists() and not plot.is_dir():
            raise ConfigError(f"--plot {plot} is a file: name a folder for the charts")
        pyplot()  # says that matplotlib is missing before anything is measured
    place = pick_device(device)
    source = Folder.open(path) if path is not None else Named(config or "", layers, group_size)
    cases = make_cases(sizes, lengths, news, place.type == "cpu", _positions(source.config))
    variants = [
        name
        for name in get_args(Variant)
        if (name == "dense" and (dense or not source.quantized))
        or (name != "dense" and source.quantized and (fused is None or (name == "fused") == fused))
    ]
    chosen = default_dtype(place) if dtype is None else getattr(torch, dtype)
    with progress_bar("bench") as step:
        report = run(source, variants, cases, place, chosen, repeats, step)
    files = write_plots(report, plot) if plot is not None and report.rows else ()
    if as_json:
        from ._output import print_json

        print_json(as_data(report) | {"plots": [str(file) for file in files]})
        return
    print_report(report)
    for file in files:
        print(f"{file} is written")


def numbers(option: str, given: list[str] | None) -> list[int]:
    """``["1,2", "8"]`` to [1, 2, 8]; ConfigError for what is no positive number."""
    words = [word.strip() for text in given or [] for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit()) or int(word) == 0:
            raise ConfigError(f"{option} {','.join(words)}: {word!r} is not a positive number")
    return [int(word) for word in words]


def make_cases(sizes: list[int], lengths: list[int], news: list[int], on_cpu: bool, longest: int | None) -> list[Case]:
    """Each pair of lengths with each batch size; default lengths that the model has no positions for are left out."""
    from ..bench.loops import Case

    named = bool(lengths)
    lengths = lengths or [int(word) for word in (CPU_LENGTHS if on_cpu else LENGTHS).split(",")]
    if len(news) not in (0, 1, len(lengths)):
        raise ConfigError(
            f"--decode has {len(news)} numbers for {len(lengths)} prompt lengths: give one for each, or one for all"
        )
    news = news * len(lengths) if len(news) == 1 else news or lengths
    cases = [Case(size, p, d) for size in sizes for p, d in zip(lengths, news, strict=True)]
    return cases if named or longest is None else [case for case in cases if case.length <= longest] or cases


def _positions(config: Any) -> int | None:
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found
