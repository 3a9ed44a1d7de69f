"""Accuracy, time and memory of quantizing: dense, rounding to nearest, the paper's search, awq-core's.

Each seed is one permutation of the model's channels and one draw of calibration windows. The permutation computes the
same function and hides that the weights come from a GGUF file, whose blocks of 32 would flatter some methods.
Each run is a process of its own, so that its time and peak memory are its own. KL(dense || quantized), top-1 agreement
and perplexity are taken over the same windows of the held-out texts, through the kernels that a user gets.

    python benchmarks/quantize.py --calib DIR --heldout FILE [FILE ...] --seeds 0 1 2 --groups 192 64 32 --save NAME

With ``--save`` rows are added to those of earlier runs of that name, so that a long comparison can be cut in pieces.

Without texts of your own it calibrates on one of those that travel with awq-core and measures on the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from _permute import permuted
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq_core
from awq_core._version import __version__
from awq_core.cli._small_model import find_dense_model

RESULTS = Path(__file__).parent / "results"
CONTEXT, PART = 512, 128  # tokens of a window, and those whose probabilities are compared at a time
METHODS = {"rtn": ["--method", "rtn"], "paper": ["--paper"], "awq-core": []}

COMMAND = """
import atexit, resource
from pathlib import Path

def used():
    spent = resource.getrusage(resource.RUSAGE_SELF)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    print(spent.ru_utime + spent.ru_stime, (own[0] if own else spent.ru_maxrss) * 1024 / 1e9)

atexit.register(used)
from awq_core.cli import main
main()
"""


@dataclass
class Row:
    """One quantized model (or the dense one) on one seed."""

    method: str
    group: int | None
    seed: int
    kl: float
    top1: float
    perplexity: dict[str, float]
    seconds: float
    cpu_seconds: float
    peak_gb: float

    @property
    def key(self) -> tuple[str, int | None, int]:
        """What is measured once."""
        return self.method, self.group, self.seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model folder (default: the demo's SmolLM2-135M)")
    parser.add_argument("--calib", type=Path, help="calibration text, a file or folder")
    parser.add_argument("--heldout", type=Path, nargs="+", help="texts to measure on")
    parser.add_argument("--groups", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--windows", type=int, default=8, help=f"of {CONTEXT} tokens, from each held-out text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="in which to measure")
    parser.add_argument("--processor", help="its name, where /proc/cpuinfo does not tell which one it is")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--save", metavar="NAME", help="also write results/quantize-NAME.txt and .json")
    args = parser.parse_args()
    ours = Path(awq_core.__file__).parent / "data"
    args.calib, args.heldout = args.calib or ours / "jargon.txt", args.heldout or [ours / "emma.txt"]
    os.environ["HF_HUB_OFFLINE"] = "1"
    awq_core.enable()
    source = args.model or find_dense_model(lambda text: print(text, file=sys.stderr))
    place = RESULTS / f"quantize-{args.save}.json" if args.save else None
    about, rows = machine(args), []
    if place is not None and place.exists():
        saved = json.loads(place.read_text())
        if saved["about"] != about:
            sys.exit(f"{place} was measured elsewhere or otherwise: choose another --save")
        rows = [Row(**row) for row in saved["rows"]]
    args.dense_measured = any(row.method == "dense" for row in rows)
    for new in measure(source, args):
        rows = [row for row in rows if row.key != new.key] + [new]
        if place is not None:
            save(place, about, rows)
    data = {"about": about, "rows": [asdict(row) for row in rows]}
    print(json.dumps(data, indent=1) if args.json else text(about, rows))


def save(place: Path, about: dict[str, Any], rows: list[Row]) -> None:
    """As data, and as a table beside it."""
    place.parent.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    place.write_text(f'{{"about": {json.dumps(about)},\n "rows": [\n  {lines}]}}\n')
    place.with_suffix(".txt").write_text(text(about, rows) + "\n")


def text(about: dict[str, Any], rows: list[Row]) -> str:
    """What a person reads."""
    return "\n".join([*(f"{name}: {value}" for name, value in about.items()), "", table(rows)])


def measure(source: Path, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each seed, group size and method."""
    tokenizer, dtype = AutoTokenizer.from_pretrained(source), getattr(torch, args.dtype)
    texts = {file.stem: windows(tokenizer, file, args.windows) for file in args.heldout}
    with tempfile.TemporaryDirectory(prefix="awq-bench-") as scratch:
        place = Path(scratch)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        reference = log_probabilities(model, texts)
        if not args.dense_measured:
            yield Row("dense", None, 0, *evaluate(model, texts, reference), 0, 0, 0)
        del model
        for seed in args.seeds:
            dense = permuted(source, seed, place / f"dense-{seed}")
            for group in args.groups:
                for method in args.methods:
                    print(f"seed {seed}, group {group}, {method}", file=sys.stderr)
                    out = place / "out"
                    options = [*METHODS[method], "--group-size", str(group), "--overwrite"]
                    if method != "rtn":
                        options += ["--seed", str(seed), "--calib", str(args.calib)]
                    seconds, cpu, peak = timed(["quantize", str(dense), str(out), *options])
                    scores = evaluate(AutoModelForCausalLM.from_pretrained(out, dtype=dtype), texts, reference)
                    yield Row(method, group, seed, *scores, seconds, cpu, peak)


def timed(arguments: list[str]) -> tuple[float, float, float]:
    """Wall time, processor time and peak memory (GB) of an ``awq`` command.

    Linux keeps the peak of the process that started another one in the other's ``ru_maxrss``, so that there the peak is
    taken from the command's own address space.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"awq {' '.join(arguments)} failed")
    cpu, peak = (float(part) for part in said.splitlines()[-1].split())
    return time.perf_counter() - started, cpu, peak


def windows(tokenizer: object, file: Path, count: int) -> torch.Tensor:
    """``count`` windows [count, CONTEXT] spread evenly over the text."""
    ids = torch.tensor(tokenizer(file.read_text("utf-8"), verbose=False).input_ids)  # type: ignore[operator]
    last = len(ids) - CONTEXT
    starts = [i * last // max(1, count - 1) for i in range(count)]
    return torch.stack([ids[start : start + CONTEXT] for start in starts])


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, texts: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Of each window of each text, [CONTEXT, V]."""
    return {name: [torch.log_softmax(model(one[None]).logits[0], -1) for one in ids] for name, ids in texts.items()}


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, texts: dict[str, torch.Tensor], reference: dict[str, list[torch.Tensor]]
) -> tuple[float, float, dict[str, float]]:
    """KL(reference || model) in nats and top-1 agreement over all tokens of all texts; perplexity of each text."""
    kl, same, count, perplexity = 0.0, 0, 0, {}
    for name, ids in texts.items():
        surprise = 0.0
        for tokens, wanted in zip(ids, reference[name], strict=True):
            found = model(tokens[None]).logits[0]
            follow = torch.cat([tokens[1:], tokens[:1]])
            for p, logits, to in zip(wanted.split(PART), found.split(PART), follow.split(PART), strict=True):
                q = torch.log_softmax(logits.to(p.dtype), -1)
                kl += float((p.exp() * (p - q)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
                told = q.gather(1, to[:, None])
                surprise -= float(told.sum())
            surprise += float(told[-1])  # after the last token there is none
            count += len(tokens)
        perplexity[name] = math.exp(surprise / (len(ids) * (CONTEXT - 1)))
    return kl / count, same / count, perplexity


def table(rows: list[Row]) -> str:
    """Means over the seeds."""
    names = list(rows[0].perplexity)
    head = ["method", "group", "seeds", "KL", "top-1", *(f"ppl {n}" for n in names), "seconds", "CPU s", "peak GB"]
    lines = [" | ".join(head)]
    order = {name: number for number, name in enumerate(METHODS)}
    keys = {(row.method, row.group) for row in rows}
    for method, group in sorted(keys, key=lambda key: (key[1] or 0, order.get(key[0], 0))):
        own = [row for row in rows if (row.method, row.group) == (method, group)]
        kls = [row.kl for row in own]
        spread = f" ({min(kls):.4f}-{max(kls):.4f})" if len(own) > 1 else ""
        values = [f"{mean(row.perplexity[name] for row in own):.2f}" for name in names]
        times = [f"{mean(getattr(row, name) for row in own):.0f}" for name in ("seconds", "cpu_seconds")]
        kl, top1 = f"{mean(kls):.4f}{spread}", f"{mean(row.top1 for row in own):.3f}"
        peak = f"{max(row.peak_gb for row in own):.2f}"
        lines.append(" | ".join([method, str(group or "-"), str(len(own)), kl, top1, *values, *times, peak]))
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on, beside awq-core."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = {"model": args.model.name} if args.model else {}
    return model | {
        "processor": args.processor or f"{next(names, 'unknown')}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, awq-core {__version__}",
        "calibration": args.calib.name,
        "heldout": [file.name for file in args.heldout],
        "measured": f"{args.windows} windows of {CONTEXT} tokens of each text, {args.dtype}",
    }


if __name__ == "__main__":
    main()
