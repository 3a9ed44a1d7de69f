"""Prefill and decode tokens/s of one model: its AWQ checkpoint against the dense model, in the same run.

The variants take turns, round by round, so that a change of the machine's speed meets all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import awq_core
from awq_core.explain import plan_line
from awq_core.hf.quantize import quantize
from awq_core.linear import AwqLinear

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
DEMO = CACHE / "awq-core" / "demo" / "SmolLM2-135M-Instruct"


def quantized_bytes(model: torch.nn.Module) -> int:
    """Bytes that the quantized linears hold, of whatever kind."""
    total = 0
    for module in model.modules():
        if isinstance(module, AwqLinear):
            total += sum(t.numel() * t.element_size() for t in module.weight_state.tensors().values())
    return total


@torch.inference_mode()
def prefill(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of one forward over ``ids`` [1, P], logits of the last token only."""
    began = time.perf_counter()
    model(ids, logits_to_keep=1, use_cache=True)
    return time.perf_counter() - began


@torch.inference_mode()
def decode(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> float:
    """Seconds of ``tokens`` greedy steps after a prefill of ``ids``."""
    out = model(ids, logits_to_keep=1, use_cache=True)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    began = time.perf_counter()
    for _ in range(tokens):
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path, nargs="?", default=DEMO, help="folder of the dense model")
    parser.add_argument("awq", type=Path, nargs="?", help="folder of its AWQ checkpoint (default: made, g=64)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--decode", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not args.dense.is_dir():
        raise SystemExit(f"{args.dense} is not there: run `awq demo` first, which makes it")
    made = tempfile.TemporaryDirectory()
    if args.awq is None:
        args.awq = quantize(args.dense, Path(made.name) / "awq", group_size=64, method="rtn").out
    awq_core.enable()
    console = Console(width=160)
    console.print(
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, awq-core {awq_core.__version__}"
    )
    table = Table("dtype", "model", "linears MB", *(f"prefill {p}" for p in args.prefill), f"decode {args.decode}")
    plans: dict[str, None] = {}
    for dtype in args.dtypes:
        models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
            for name, path in (("dense", args.dense), ("awq", args.awq))
        }
        for module in models["awq"].modules():
            if isinstance(module, AwqLinear):
                assert module.weight_state.plan is not None
                plans[f"{dtype}: {plan_line(module.weight_state.plan)}"] = None
        ids = torch.randint(10, 1000, (1, max(args.prefill)), generator=torch.Generator().manual_seed(0))
        times: dict[tuple[str, str], list[float]] = {}
        for round_number in range(args.rounds + 1):
            for name, model in models.items():
                for p in args.prefill:
                    seconds = prefill(model, ids[:, :p])
                    if round_number:
                        times.setdefault((name, f"p{p}"), []).append(p / seconds)
                seconds = decode(model, ids[:, :128], args.decode if round_number else 4)
                if round_number:
                    times.setdefault((name, "decode"), []).append(args.decode / seconds)
        middle = {key: statistics.median(values) for key, values in times.items()}
        packed = quantized_bytes(models["awq"])
        dense = (
            sum(m.in_features * m.out_features for m in models["awq"].modules() if isinstance(m, AwqLinear))
            * torch.finfo(getattr(torch, dtype)).bits
            // 8
        )
        for name in models:
            cells = []
            for what in [*(f"p{p}" for p in args.prefill), "decode"]:
                ratio = middle["awq", what] / middle["dense", what]
                spread = f"{middle[name, what]:.1f} ({max(times[name, what]):.1f})"
                cells.append(spread + (f" {ratio:.2f}x" if name == "awq" else ""))
            size = packed if name == "awq" else dense
            table.add_row(
                dtype, name, f"{size / 1e6:.1f}" + (f" {packed / dense:.3f}x" if name == "awq" else ""), *cells
            )
        del models
    console.print(table)
    console.print("tokens/s, median (best) of the rounds; x is AWQ over dense in the same dtype")
    for line in plans:
        console.print(line)


if __name__ == "__main__":
    main()
