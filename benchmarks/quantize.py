"""Accuracy, time and memory of quantizing: dense, rounding to nearest, the paper's search, awq-core's.

Each seed is one permutation of the model's channels and one draw of calibration windows. The permutation computes the
same function and hides that SmolLM2's weights come from a GGUF file, whose blocks of 32 would flatter some methods.
Each run is a process of its own, so that its time and peak memory are its own. KL(dense || quantized), top-1 agreement
and perplexity are taken over the same windows of the held-out texts, in bfloat16, through the kernels that a user gets.

    python benchmarks/quantize.py --calib DIR --heldout FILE [FILE ...] --seeds 3 --groups 192 64 32 --save NAME

Without texts of your own it calibrates on one of those that travel with awq-core and measures on the other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq_core
from awq_core.cli._small_model import find_dense_model

RESULTS = Path(__file__).parent / "results"
CONTEXT = 512
METHODS = {"rtn": ["--method", "rtn"], "paper": ["--paper"], "awq-core": []}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a dense model folder (default: the demo's SmolLM2-135M)")
    parser.add_argument("--calib", type=Path, help="calibration text, a file or folder")
    parser.add_argument("--heldout", type=Path, nargs="+", help="texts to measure on")
    parser.add_argument("--groups", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--windows", type=int, default=8, help=f"of {CONTEXT} tokens, from each held-out text")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--save", metavar="NAME", help="also write results/quantize-NAME.txt and .json")
    args = parser.parse_args()
    ours = Path(awq_core.__file__).parent / "data"
    args.calib, args.heldout = args.calib or ours / "jargon.txt", args.heldout or [ours / "emma.txt"]
    os.environ["HF_HUB_OFFLINE"] = "1"
    awq_core.enable()
    source = args.model or find_dense_model(lambda text: print(text, file=sys.stderr))
    rows = list(measure(source, args))
    text = machine() + "\n" + table(rows)
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"quantize-{args.save}.txt").write_text(text + "\n")
        (RESULTS / f"quantize-{args.save}.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else text)


def measure(source: Path, args: argparse.Namespace) -> Iterator[Row]:
    """A row for each seed, group size and method."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = {file.stem: windows(tokenizer, file, args.windows) for file in args.heldout}
    with tempfile.TemporaryDirectory(prefix="awq-bench-") as scratch:
        place = Path(scratch)
        reference = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16), texts)
        yield Row("dense", None, 0, 0.0, 1.0, {n: perplexity(reference[n], ids) for n, ids in texts.items()}, 0, 0, 0)
        for seed in range(args.seeds):
            dense = permuted(source, seed, place / f"dense-{seed}")
            for group in args.groups:
                for method in args.methods:
                    print(f"seed {seed}, group {group}, {method}", file=sys.stderr)
                    out = place / "out"
                    options = [*METHODS[method], "--group-size", str(group), "--overwrite"]
                    if method != "rtn":
                        options += ["--seed", str(seed), "--calib", str(args.calib)]
                    seconds, cpu, peak = timed(["quantize", str(dense), str(out), *options])
                    found = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16), texts)
                    kl, top1 = compare(reference, found)
                    values = {name: perplexity(found[name], ids) for name, ids in texts.items()}
                    yield Row(method, group, seed, kl, top1, values, seconds, cpu, peak)


def timed(arguments: list[str]) -> tuple[float, float, float]:
    """Wall time, processor time and peak memory (GB) of an ``awq`` command."""
    started = time.perf_counter()
    command = [sys.executable, "-c", "from awq_core.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # wait4 took it from Popen
    if process.returncode:
        sys.exit(f"awq {' '.join(arguments)} failed")
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def windows(tokenizer: object, file: Path, count: int) -> torch.Tensor:
    """``count`` windows [count, CONTEXT] spread evenly over the text."""
    ids = torch.tensor(tokenizer(file.read_text("utf-8"), verbose=False).input_ids)  # type: ignore[operator]
    last = len(ids) - CONTEXT
    starts = [i * last // max(1, count - 1) for i in range(count)]
    return torch.stack([ids[start : start + CONTEXT] for start in starts])


@torch.inference_mode()
def logits(model: torch.nn.Module, texts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each text, [count, CONTEXT, V] in bfloat16."""
    model.eval()
    return {name: torch.cat([model(part).logits.bfloat16() for part in ids.split(2)]) for name, ids in texts.items()}


@torch.inference_mode()
def perplexity(found: torch.Tensor, ids: torch.Tensor) -> float:
    total = 0.0
    for one, tokens in zip(found, ids, strict=True):
        total -= torch.log_softmax(one[:-1].float(), -1).gather(1, tokens[1:, None]).mean().item()
    return float(torch.tensor(total / len(ids)).exp())


@torch.inference_mode()
def compare(reference: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> tuple[float, float]:
    """KL(reference || found) in nats and top-1 agreement, over all tokens of all texts."""
    kl, same, count = 0.0, 0, 0
    for name, ours in found.items():
        for p, q in zip(reference[name], ours, strict=True):
            p_log, q_log = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
            kl += (p_log.exp() * (p_log - q_log)).sum().item()
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    return kl / count, same / count


def permuted(source: Path, seed: int, out: Path) -> Path:
    """The same function with its channels in another order: residual stream, MLP and each kv head."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden_size, generator=generator)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv = config.num_attention_heads, config.num_key_value_heads

    def take(tensor: torch.Tensor, order: torch.Tensor, axis: int) -> None:
        tensor.data = tensor.data.index_select(axis, order).contiguous()

    take(model.model.embed_tokens.weight, hidden, 1)
    if not config.tie_word_embeddings:
        take(model.lm_head.weight, hidden, 1)
    take(model.model.norm.weight, hidden, 0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            take(norm.weight, hidden, 0)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            take(linear.weight, hidden, 1)
        for linear in (attention.o_proj, mlp.down_proj):
            take(linear.weight, hidden, 0)
        inner = torch.randperm(config.intermediate_size, generator=generator)
        take(mlp.gate_proj.weight, inner, 0)
        take(mlp.up_proj.weight, inner, 0)
        take(mlp.down_proj.weight, inner, 1)
        orders = [torch.randperm(size, generator=generator) for _ in range(kv)]
        take(attention.v_proj.weight, torch.cat([i * size + order for i, order in enumerate(orders)]), 0)
        from_v = torch.cat([i * size + orders[i * kv // heads] for i in range(heads)])
        take(attention.o_proj.weight, from_v, 1)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


def table(rows: list[Row]) -> str:
    """Means over the seeds."""
    names = list(rows[0].perplexity)
    lines = [" | ".join(["method", "group", "seeds", "KL", "top-1", *names, "seconds", "CPU s", "peak GB"])]
    keys = dict.fromkeys((row.method, row.group) for row in rows)
    for method, group in keys:
        own = [row for row in rows if (row.method, row.group) == (method, group)]
        kls = [row.kl for row in own]
        spread = f" ({min(kls):.4f}-{max(kls):.4f})" if len(own) > 1 else ""
        values = [f"{mean(row.perplexity[name] for row in own):.2f}" for name in names]
        times = [f"{mean(getattr(row, name) for row in own):.0f}" for name in ("seconds", "cpu_seconds")]
        kl, top1 = f"{mean(kls):.4f}{spread}", f"{mean(row.top1 for row in own):.3f}"
        peak = f"{max(row.peak_gb for row in own):.2f}"
        lines.append(" | ".join([method, str(group or "-"), str(len(own)), kl, top1, *values, *times, peak]))
    return "\n".join(lines)


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
