"""``awq eval``: perplexity of checkpoints on a held-out text, and how far they are from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._evaluation import Context, EvalDevice, Stride, Text, WindowCount, evaluate, show
from ._options import AsJson, DtypeOption, VersionOption


def eval_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folders of models, dense or AWQ; all are held in memory at once."),
    ],
    text: Text = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="DENSE", help="Folder of the dense model to compare with.", show_default=False),
    ] = None,
    context: Context = 512,
    stride: Stride = None,
    windows: WindowCount = 32,
    dtype: DtypeOption = None,
    device: EvalDevice = None,
    version: VersionOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a held-out text and, with --against, the KL divergence from the dense model.

    Every model predicts the same tokens of the same windows; no BOS token is added. KL(dense‖model) is the mean over
    the predicted tokens, in nats: much less noisy than a difference of perplexities. Top-1 agreement is the share of
    tokens at which both models find the same token most likely. tokens/s is that of whole windows, batched. Where a CPU
    has no bfloat16 instructions, --dtype float32 is several times as fast for a dense model.
    """
    every = paths if against is None or against in paths else [against, *paths]
    found = evaluate(every, against, text, context, stride, windows, dtype, device, version)
    show(found, "Evaluation", as_json)
