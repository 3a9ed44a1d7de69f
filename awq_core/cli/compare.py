"""``awq compare``: two checkpoints of one model side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._evaluation import Context, EvalDevice, Evaluated, Stride, Text, WindowCount, evaluate
from ._options import AsJson, DtypeOption, VersionOption


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of a model, dense or AWQ: the reference.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of the other one.")],
    text: Text = None,
    context: Context = 512,
    stride: Stride = None,
    windows: WindowCount = 32,
    dtype: DtypeOption = None,
    device: EvalDevice = None,
    version: VersionOption = None,
    as_json: AsJson = False,
) -> None:
    """Set two checkpoints of one model side by side: perplexity, sizes, speed, and how far B is from A.

    KL(A‖B) and top-1 agreement take A as the reference. Options and definitions are those of `awq eval`.
    """
    from ._output import console, print_json, table

    found = evaluate([a, b], a, text, context, stride, windows, dtype, device, version)
    if as_json:
        print_json(found.data() | {"ratios": {name: ratio for name, _, _, ratio in _values(found)}})
        return
    screen = console()
    rows = [(name, _text(name, one), _text(name, two), f"{ratio:.3f}x") for name, one, two, ratio in _values(found)]
    screen.print(table("A and B", "| >A | >B | >B / A", [("model", a, b, ""), _kinds(found), *rows]))
    score = found.rows[1].score
    screen.print(f"KL(A‖B) {score.kl:.4f} nats, top-1 agreement {score.top1:.4f}; {found.caption()}", soft_wrap=True)


def _kinds(found: Evaluated) -> tuple[str, ...]:
    return ("kind", *(row.kind for row in found.rows), "")


def _values(found: Evaluated) -> list[tuple[str, float, float, float]]:
    """Name, A, B and B over A of every figure."""
    one, two = ((row.score.perplexity, row.disk, row.memory, row.score.tokens_per_second) for row in found.rows)
    names = ("perplexity", "on disk", "in memory", "tokens/s")
    return [(name, x, y, y / x) for name, x, y in zip(names, one, two, strict=True)]


def _text(name: str, value: Any) -> str:
    from ._output import size

    return (
        size(value) if name in ("on disk", "in memory") else f"{value:.3f}" if name == "perplexity" else f"{value:.0f}"
    )
