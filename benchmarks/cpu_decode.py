"""Greedy decode on a CPU: dense, AWQ, fused, fused with an int8 head, and llama.cpp, taking turns in one run.

    python benchmarks/cpu_decode.py --llama-python VENV/bin/python --gguf SmolLM2-135M-Instruct.Q4_1.gguf

llama.cpp runs in a process of its own, by the Python that has ``llama-cpp-python`` (built natively for the machine).
All get the same prompt length and number of tokens. ``generate`` is transformers' own, the time of one token taken off;
``raw`` is the loop of steps; llama.cpp is a loop of its ``eval`` and an argmax.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve_llama(gguf: str, threads: int, prompt: int, new: int) -> None:
    """One round for each line of stdin; prints tokens/s of prefill and decode."""
    import numpy as np
    from llama_cpp import Llama

    model = Llama(gguf, n_ctx=prompt + new + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
    ids = [10 + 7 * i % 990 for i in range(prompt)]
    for _ in sys.stdin:
        model.reset()
        began = time.perf_counter()
        model.eval(ids)
        prefilled = time.perf_counter()
        for _ in range(new):
            logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))
            model.eval([int(logits.argmax())])
        done = time.perf_counter()
        print(json.dumps([prompt / (prefilled - began), new / (done - prefilled)]), flush=True)


class Llama:
    """llama.cpp behind a pipe."""

    def __init__(self, args: argparse.Namespace, threads: int) -> None:
        command = [args.llama_python, __file__, "--serve", str(args.gguf), str(threads)]
        command += ["--prompt", str(args.prompt), "--new", str(args.new)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def round(self) -> tuple[float, float]:
        """Tokens/s of prefill and of decode."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        prefill, decode = json.loads(self.process.stdout.readline())
        return prefill, decode


def models(args: argparse.Namespace) -> dict[str, Callable[[], tuple[float, ...]]]:
    """A round of each: tokens/s of prefill and of ``generate``; of the fused ones of the raw loop, too."""
    import torch
    import transformers

    import awq_core
    from awq_core.hf.quantize import quantize
    from awq_fusers.decode import int8_head

    awq = args.awq or quantize(args.dense, Path(tempfile.mkdtemp()) / "awq", group_size=64, method="rtn").out
    awq_core.enable()
    transformers.utils.logging.set_verbosity_error()
    ids = torch.tensor([[10 + 7 * i % 990 for i in range(args.prompt)]])

    def load(path: Path, **options: Any) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        return model

    def seconds(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    @torch.inference_mode()
    def round_of(model: Any) -> tuple[float, ...]:
        def generate(new: int) -> float:
            mask = torch.ones_like(ids)
            return seconds(lambda: model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False))

        prefill = args.prompt / seconds(lambda: model(ids, logits_to_keep=1, use_cache=True))
        found = (prefill, args.new / (generate(args.new + 1) - generate(1)))
        engine = model.__dict__.get("_awq_decode")
        if engine is None:
            return found
        with engine.session(1, args.prompt + args.new + 1) as session:
            session.start(args.prompt)

            def loop() -> None:
                tokens = ids[:, 0]
                for _ in range(args.new):
                    tokens = session.logits(tokens).max(-1).indices

            return (*found, args.new / seconds(loop))

    fused = {"quantization_config": awq_core.AwqConfig(do_fuse=True, fuse_max_seq_len=args.prompt + args.new + 2)}
    made = {
        "dense bfloat16": load(args.dense),
        "AWQ": load(awq),
        "AWQ, fused": load(awq, **fused),
        "AWQ, fused, int8_head": load(awq, **fused),
    }
    int8_head(made["AWQ, fused, int8_head"])
    return {name: (lambda model=model: round_of(model)) for name, model in made.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="folder of the dense model (default: what `awq demo` made)")
    parser.add_argument("--awq", type=Path, help="folder of its AWQ checkpoint (default: made, g=64)")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_llama(args.serve[0], int(args.serve[1]), args.prompt, args.new)
        return

    import torch
    import transformers
    from cpu_linear import cpu_name
    from generate import DEMO
    from rich.console import Console
    from rich.table import Table

    args.dense = args.dense or DEMO
    rounds = models(args)
    if args.llama_python:
        rounds["llama.cpp, Q4_1"] = Llama(args, torch.get_num_threads()).round
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in rounds}
    for number in range(args.rounds + 1):
        for name, run in rounds.items():
            found = run()
            if number:
                times[name].append(found)
    console = Console(width=150)
    console.print(
        f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; prompt {args.prompt}, {args.new} new tokens"
    )
    table = Table("tokens/s, median (best)", "prefill", "decode, generate()", "decode, raw loop")
    for name, found in times.items():
        columns = [f"{statistics.median(c):.1f} ({max(c):.1f})" for c in zip(*found, strict=True)]
        if name.startswith("llama"):
            columns.insert(1, "")
        table.add_row(name, *columns)
    console.print(table)


if __name__ == "__main__":
    main()
