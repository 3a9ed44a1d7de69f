"""What ``awq eval`` and ``awq compare`` share: models, text and windows in, scores and sizes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AwqError, ConfigError

if TYPE_CHECKING:
    from ..evaluation.scores import Score
    from ..evaluation.text import Windows
    from ..hf.generation import Loaded

Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Held-out text, UTF-8. Left out: the beginning of Persuasion (Jane Austen, public domain).",
        show_default=False,
    ),
]
Context = Annotated[int, typer.Option(min=2, metavar="TOKENS", help="Tokens of one window.")]
Stride = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Tokens from one window to the next. Left out: the context, so that windows are independent.",
        show_default=False,
    ),
]
WindowCount = Annotated[
    int, typer.Option("--windows", min=0, metavar="N", help="Windows, spread evenly over the text. 0: all of them.")
]
EvalDevice = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 or auto. Left out: a GPU where there is one."),
]
COUNTED = "| >perplexity | >KL(reference‖model), nats | >top-1 agreement | >on disk | >in memory | >tokens/s"


@dataclass(frozen=True)
class Row:
    """One model: what it is, its score, its bytes on disk and in memory."""

    path: Path
    kind: str
    score: Score
    disk: int
    memory: int
    reference: bool

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "reference": self.reference,
            "perplexity": self.score.perplexity,
            "nll": self.score.nll,
            "kl": self.score.kl,
            "top1_agreement": self.score.top1,
            "tokens_per_second": self.score.tokens_per_second,
            "disk_bytes": self.disk,
            "memory_bytes": self.memory,
        }

    def cells(self) -> tuple[str, ...]:
        """For the table."""
        from ._output import size

        kl, top1 = self.score.kl, self.score.top1
        return (
            str(self.path),
            self.kind,
            f"{self.score.perplexity:.3f}",
            "reference" if self.reference else "-" if kl is None else f"{kl:.4f}",
            "" if self.reference else "-" if top1 is None else f"{top1:.4f}",
            size(self.disk),
            size(self.memory),
            f"{self.score.tokens_per_second:.0f}",
        )


@dataclass(frozen=True)
class Evaluated:
    """All models of a run, and how they were evaluated."""

    rows: tuple[Row, ...]
    windows: Windows
    text: str
    dtype: str
    device: str

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "text": self.text,
            "context": self.windows.context,
            "stride": self.windows.stride,
            "windows": len(self.windows.first),
            "predictions": self.windows.predictions,
            "dtype": self.dtype,
            "device": self.device,
            "models": [row.data() for row in self.rows],
        }

    def caption(self) -> str:
        """One line: what the figures stand on."""
        w = self.windows
        return (
            f"{w.predictions} predicted tokens of {self.text}: {len(w.first)} windows, context {w.context}, "
            f"stride {w.stride}; {self.dtype} on {self.device}"
        )


def evaluate(
    paths: Sequence[Path],
    reference: Path | None,
    text: Path | None,
    context: int,
    stride: int | None,
    windows: int,
    dtype: str | None,
    device: str | None,
    version: str | None = None,
) -> Evaluated:
    """Load every model, let all predict the same windows, and compare with ``reference`` (one of ``paths``)."""
    from ..checkpoint import checkpoint_files
    from ..evaluation.text import DEFAULT_NAME, cut_windows, read_text

    if len(set(paths)) < len(paths):
        raise ConfigError(f"{paths[-1]} is given twice: name different models")
    files = {path: checkpoint_files(path) for path in paths}  # before anything heavy, and before a hub is asked
    kinds = {path: _kind(path) for path in paths}
    words = read_text(text)

    from ._progress import progress_bar, starting

    with starting():
        import torch

        from ..evaluation.scores import score
        from ..hf.generation import load, memory

    try:
        with progress_bar("loading") as step:
            loaded: dict[Path, Loaded] = {}
            for number, path in enumerate(paths):
                step(number, len(paths), str(path))
                is_awq = kinds[path].startswith("AWQ")
                chosen = dtype or next((model.dtype for model in loaded.values()), _default_dtype(path, device))
                loaded[path] = load(path, chosen, device, version if is_awq else None)
        ids = _same_tokens({path: model.tokenizer for path, model in loaded.items()}, words)
        cut = cut_windows(torch.tensor(ids), context, stride, windows or None)
        with progress_bar("evaluating") as step:
            scores = score(
                {str(path): model.model for path, model in loaded.items()},
                cut,
                None if reference is None else str(reference),
                progress=step,
            )
    except torch.OutOfMemoryError as error:
        raise AwqError(
            f"out of memory on the GPU: take a smaller --context, or --device cpu ({_line(error)})"
        ) from None
    rows = tuple(
        Row(
            path,
            f"{kinds[path]} {loaded[path].dtype}",
            scores[str(path)],
            sum(file.stat().st_size for file in files[path]),
            memory(loaded[path].model)[0],
            path == reference,
        )
        for path in paths
    )
    first = loaded[paths[0]]
    return Evaluated(rows, cut, DEFAULT_NAME if text is None else str(text), first.dtype, first.device)


def show(found: Evaluated, title: str, as_json: bool) -> None:
    """Print the table and its caption, or JSON."""
    from ._output import console, print_json, table

    if as_json:
        print_json(found.data())
        return
    screen = console()
    screen.print(table(title, f"model | kind {COUNTED}", [row.cells() for row in found.rows]))
    screen.print(found.caption(), soft_wrap=True)


def _kind(path: Path) -> str:
    """``dense`` or ``AWQ g128``, from config.json."""
    from ..checkpoint import is_quantized

    if not is_quantized(path):
        return "dense"
    from ._checkpoint import open_checkpoint

    groups = {module.group_size for module in open_checkpoint(path).modules.values()}
    return f"AWQ g{'/'.join(map(str, sorted(groups)))}"


def _default_dtype(path: Path, device: str | None) -> str | None:
    """bfloat16 for a float16 model on a CPU, where float16 is slow; else None, the model's own."""
    import torch

    on_cpu = not torch.cuda.is_available() if device in (None, "auto") else device == "cpu"
    config = json.loads((path / "config.json").read_text("utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if on_cpu and named == "float16" else None


def _same_tokens(tokenizers: dict[Path, Any], words: str) -> list[int]:
    """The token ids of the text, without special tokens; ConfigError where the tokenizers differ on it."""
    found: dict[Path, list[int]] = {
        path: tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        for path, tokenizer in tokenizers.items()
    }
    first = next(iter(found))
    for path, ids in found.items():
        if ids != found[first]:
            raise ConfigError(
                f"{first} and {path} have different tokenizers, so their perplexities cannot be compared; "
                "evaluate them one by one"
            )
    return found[first]


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
