"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Dtype = Literal["float16", "bfloat16", "float32"]

CheckpointPath = Annotated[
    Path, typer.Argument(metavar="PATH", help="Folder of an AWQ checkpoint: config.json and its safetensors files.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of the activations. Left out: the checkpoint's, but bfloat16 for float16 on a CPU.",
        show_default=False,
    ),
]
VersionOption = Annotated[
    str | None,
    typer.Option(
        "--version",
        metavar="NAME",
        help="Backend to force, as AwqConfig(version=NAME) does; awq backends lists the names.",
        show_default=False,
    ),
]
