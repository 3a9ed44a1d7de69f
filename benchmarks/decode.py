"""Decode speed of a fused model with random weights: the raw loop of steps, ``generate()``, where a step's time goes.

    python benchmarks/decode.py --config mistral-7b --prefill 128 2048 --batch 1 8 --json decode.json

First a model of two layers is checked: the fast step's logits against those of the unfused model, teacher-forced.
Then, for each batch and prompt length: prefill, tokens per second of the raw loop (steps, started one after the other)
and of ``generate()`` (greedy, the time of n + 1 tokens less that of one), what transformers does with the same
fused linears and its own forward, and peak memory. ``--dense`` and ``--unfused`` add models, one at a time;
``--tinygemm`` the peer that PyTorch itself brings: its int4 kernel, a static cache, a compiled step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import awq_core
from awq_core.bench.models import default_dtype, random_awq_model, random_dense_model
from awq_core.hf.decode import attach, detach, why_not

CONSOLE = Console(width=170)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], Any], rounds: int = 3) -> float:
    """Median seconds of ``run`` after one that warms up."""
    run()
    seconds = []
    for _ in range(rounds):
        wait(device)
        began = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def prompt(model: Any, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, model.config.vocab_size - 10, (batch, length), generator=generator).to(model.device)


def generate(model: Any, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)


@contextmanager
def quiet_model(make: Callable[..., Any], **options: Any) -> Iterator[Any]:
    """A model that never ends a sequence by itself."""
    model = make(**options)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    yield model
    detach(model)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def maker(args: argparse.Namespace, kind: str) -> Callable[..., Any]:
    """What makes the ``fused``, ``unfused`` or ``dense`` model: with random weights, or from ``--path``."""

    def make(device: torch.device, dtype: torch.dtype, longest: int) -> Any:
        if args.path is not None:
            asked = awq_core.AwqConfig(do_fuse=True, fuse_max_seq_len=longest) if kind == "fused" else None
            options = {"dtype": dtype, "device_map": str(device)} | ({"quantization_config": asked} if asked else {})
            return transformers.AutoModelForCausalLM.from_pretrained(args.path, **options).eval()
        sizes = {"config": args.config, "layers": args.layers, "device": device, "dtype": dtype}
        if kind == "dense":
            return random_dense_model(**sizes)
        return random_awq_model(**sizes, fuse_max_seq_len=longest if kind == "fused" else None)

    return make


def engine_of(model: Any) -> Any:
    engine = model.__dict__["_awq_decode"]
    reason = why_not(model)
    if reason is not None:
        raise SystemExit(f"no fast decode step: {reason}")
    return engine


@torch.no_grad()
def check(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The fast step against the unfused model of two layers: teacher-forced logits, and greedy tokens."""
    options = {"config": args.config, "layers": 2, "device": device, "dtype": dtype}
    found: dict[str, Any] = {}
    with quiet_model(random_awq_model, **options) as plain:
        for batch in sorted({1, 3, *args.batch}):
            ids = prompt(plain, batch, 160)
            pads = torch.zeros(batch, dtype=torch.long, device=device)
            pads[0] = 0 if batch == 1 else 11
            mask = (torch.arange(160, device=device) >= pads[:, None]).long()
            places = (mask.cumsum(-1) - 1).clamp_min(0)
            reference = plain(ids, attention_mask=mask, position_ids=places).logits[:, 99:].float()
            found[batch] = (ids, pads, mask, reference, generate(plain, ids[-1:, :100], 40))
    errors = {}
    with quiet_model(random_awq_model, fuse_max_seq_len=512, **options) as fused:
        engine = engine_of(fused)
        for batch, (ids, pads, mask, reference, wanted) in found.items():
            with engine.session(batch, 200) as session:
                session.start(0, pads if bool(pads.any()) else None)
                logits = session.prefill(ids[:, :100])
                if logits is None:
                    from awq_core.hf.decode import StaticMemory

                    memory = StaticMemory(session)
                    inputs = {
                        "attention_mask": mask[:, :100],
                        "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, :100],
                    }
                    logits = fused(ids[:, :100], past_key_values=memory, **inputs).logits[:, -1]
                steps = [logits.float().clone()]
                for t in range(100, 160):
                    steps.append(session.logits(ids[:, t]).float().clone())
            got = torch.stack(steps, 1)
            error = (got - reference).norm() / reference.norm()
            same = (got.argmax(-1) == reference.argmax(-1)).float().mean()
            tokens = generate(fused, ids[-1:, :100], 40)
            agree = int((tokens[0, 100:] == wanted[0, 100:]).long().cumprod(0).sum())
            errors[batch] = {"relative_error": float(error), "argmax_same": float(same), "greedy_same_of_40": agree}
            CONSOLE.print(
                f"check batch {batch}: relative error {error:.2e}, argmax same {same:.1%}, "
                f"first {agree} of 40 greedy tokens the same"
            )
            limit = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
            if not error < limit:
                raise SystemExit(f"the fast step is wrong: relative error {error:.2e} at batch {batch}, limit {limit}")
    return errors


@torch.no_grad()
def raw_loop(engine: Any, model: Any, batch: int, length: int, new: int, device: torch.device) -> dict[str, float]:
    """Seconds of a prefill and of a step in the engine's own loop."""
    ids = prompt(model, batch, length)
    with engine.session(batch, length + new + 2) as session:

        def prefill() -> torch.Tensor:
            session.start(0, None)
            logits = session.prefill(ids)
            if logits is None:
                from awq_core.hf.decode import StaticMemory

                logits = model(ids, past_key_values=StaticMemory(session), logits_to_keep=1).logits[:, -1]
            session.start(length, None)
            return logits

        prefill_seconds = timed(device, prefill)
        tokens = prefill().max(-1).indices
        if hasattr(session.step, "start_greedy"):

            def loop() -> None:
                state = session.step.start_greedy(tokens, torch.ones_like(tokens), None, 0, length, None)
                for _ in range(new):
                    state.run()
        else:

            def loop() -> None:
                session.start(length, None)
                following = tokens
                for _ in range(new):
                    following = session.logits(following).max(-1).indices

        return {"prefill_s": prefill_seconds, "step_s": timed(device, loop) / new}


def generate_rate(
    model: Any, batch: int, length: int, new: int, device: torch.device, rounds: int = 3, **options: Any
) -> float:
    """Tokens per second of ``generate()``, prefill taken off."""
    ids = prompt(model, batch, length)
    one = timed(device, lambda: generate(model, ids, 1, **options), rounds)
    many = timed(device, lambda: generate(model, ids, new + 1, **options), rounds)
    return batch * new / (many - one)


@torch.no_grad()
def profile(engine: Any, model: Any, batch: int, length: int, device: torch.device, steps: int = 20) -> list[Any]:
    """Microseconds of a step by kernel (on a GPU) or operator (on a CPU), the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    ids = prompt(model, batch, length)
    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with engine.session(batch, length + 64) as session:
        session.start(0, None)
        if session.prefill(ids) is None:
            session.start(length, None)
        token = ids[:, 0]
        for _ in range(3):
            session.logits(token)
        wait(device)
        with profiler(activities=kinds) as recorded:
            for _ in range(steps):
                session.logits(token)
            wait(device)
    rows = []
    for event in recorded.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if spent:
            rows.append((event.key, event.count / steps, spent / steps))
    return sorted(rows, key=lambda row: -row[2])


def bench(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    longest = max(args.prefill) + args.decode + 16
    table = Table(
        *(
            "batch",
            "prefill",
            "prefill ms",
            "raw tok/s",
            "ms/step",
            "generate tok/s",
            "of raw",
            "HF forward tok/s",
            "peak GB",
        )
    )
    rows: list[dict[str, Any]] = []
    out: dict[str, Any] = {"rows": rows, "profiles": {}}
    with quiet_model(maker(args, "fused"), device=device, dtype=dtype, longest=longest) as model:
        engine = engine_of(model)
        wait(device)
        began = time.perf_counter()
        generate(model, prompt(model, 1, min(args.prefill)), 2)
        wait(device)
        out["first_fast_token_s"] = time.perf_counter() - began
        CONSOLE.print(f"first generate() with captures: {out['first_fast_token_s']:.2f} s")
        for batch in args.batch:
            for length in args.prefill:
                if device.type == "cuda":
                    engine.release()
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats(device)
                raw = raw_loop(engine, model, batch, length, args.decode, device)
                rate = generate_rate(model, batch, length, args.decode, device)
                peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
                steps = profile(engine, model, batch, length, device) if args.profile else []
                detach(model)
                plain = generate_rate(model, batch, length, min(16, args.decode), device, 1)
                attach(model, engine)
                row = {"batch": batch, "prefill": length, "raw_tok_s": batch / raw["step_s"], "generate_tok_s": rate}
                row |= raw | {"hf_tok_s": plain, "peak_gb": peak}
                rows.append(row)
                table.add_row(
                    *(str(batch), str(length), f"{raw['prefill_s'] * 1e3:.2f}", f"{row['raw_tok_s']:.1f}"),
                    *(f"{raw['step_s'] * 1e3:.3f}", f"{rate:.1f}", f"{rate / row['raw_tok_s']:.0%}", f"{plain:.1f}"),
                    f"{peak:.2f}",
                )
                if steps:
                    out["profiles"][f"{batch}x{length}"] = steps
                    show_profile(batch, length, steps, raw["step_s"])
    CONSOLE.print(table)
    for name in ("unfused", "dense"):
        if getattr(args, name):
            with quiet_model(maker(args, name), device=device, dtype=dtype, longest=longest) as model:
                for batch in args.batch:
                    for length in args.prefill:
                        rate = generate_rate(model, batch, length, min(16, args.decode), device, 1)
                        rows.append({"model": name, "batch": batch, "prefill": length, "generate_tok_s": rate})
                        CONSOLE.print(
                            f"{name}, transformers' generate(), batch {batch}, prefill {length}: {rate:.1f} tok/s"
                        )
    return out


class TinyLinear(torch.nn.Module):
    """A linear by PyTorch's int4 kernel, with random codes: the time does not depend on them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        n, k = linear.weight.shape
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        self.n, self.packed = n, torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        self.scales = torch.full((k // 128, n, 2), 0.005, dtype=torch.bfloat16, device="cuda")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., K] in bfloat16."""
        y = torch.ops.aten._weight_int4pack_mm(x.view(-1, x.shape[-1]), self.packed, 128, self.scales)
        return y.view(*x.shape[:-1], self.n)


@torch.no_grad()
def tinygemm(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Tokens per second of ``generate()`` with int4 linears of PyTorch, a static cache and a compiled forward."""

    def make() -> Any:
        model = random_dense_model(config=args.config, layers=args.layers, device=device, dtype=torch.bfloat16)
        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, TinyLinear(module))
        return model

    rows = []
    with quiet_model(make) as model:
        began = time.perf_counter()
        generate(model, prompt(model, 1, min(args.prefill)), 8, cache_implementation="static")
        CONSOLE.print(f"tinygemm: first generate(), compiled: {time.perf_counter() - began:.1f} s")
        for length in args.prefill:
            rate = generate_rate(model, 1, length, args.decode, device, 2, cache_implementation="static")
            rows.append({"model": "tinygemm", "batch": 1, "prefill": length, "generate_tok_s": rate})
            CONSOLE.print(f"tinygemm, static cache, compiled, batch 1, prefill {length}: {rate:.1f} tok/s")
    return rows


def show_profile(batch: int, length: int, rows: list[Any], step: float) -> None:
    total = sum(row[2] for row in rows)
    table = Table("kernel", "calls", "us a step", "us a call", title=f"batch {batch}, prefill {length}")
    for name, calls, spent in rows[:16]:
        table.add_row(name[:90], f"{calls:.0f}", f"{spent:.1f}", f"{spent / calls:.2f}")
    table.add_row(
        f"all of them; a step takes {step * 1e6:.0f} us", f"{sum(r[1] for r in rows):.0f}", f"{total:.1f}", ""
    )
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="mistral-7b", help="a name of awq_core.bench.models.CONFIGS")
    parser.add_argument(
        "--path", type=Path, help="folder of an AWQ checkpoint to measure instead (no check, no --dense)"
    )
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--prefill", type=int, nargs="+", default=[128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--programs", type=int, help="programs that an attention is split into at least")
    parser.add_argument("--no-check", dest="check", action="store_false")
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--unfused", action="store_true", help="measure the unfused model too")
    parser.add_argument("--dense", action="store_true", help="measure the dense model too")
    parser.add_argument("--tinygemm", action="store_true", help="measure PyTorch's int4 kernel, compiled, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    if args.programs:
        from awq_fusers.decode import launch

        launch.PROGRAMS = args.programs
    awq_core.enable()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    source = args.config if args.path is None else args.path.resolve().name
    CONSOLE.print(f"{source}, {dtype}, {name}, torch {torch.__version__}, transformers {transformers.__version__}")
    out: dict[str, Any] = {"device": name, "config": source, "dtype": str(dtype), "torch": torch.__version__}
    if args.check and args.path is None:
        out["check"] = check(args, device, dtype)
    out |= bench(args, device, dtype)
    if args.tinygemm:
        out["rows"] += tinygemm(args, device)
    if args.json is not None:
        args.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
