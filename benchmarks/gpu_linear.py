"""GPU kernels by shape and M: ours (as the dispatcher plans them) beside dense matmul, humming, tinygemm and gemlite.

    python benchmarks/gpu_linear.py --json linears.json

Shapes are the linears of Llama-3-8B / Mistral-7B, q+k+v and gate+up joined; k alone; and a small square one. Weights
rotate over enough copies that the L2 does not help; at least 24 calls are captured in one CUDA graph, whose replays are
timed (median). Every result is checked against float64 on the dequantized weight, on poisoned output memory. Percent
are of the bandwidth of a copy in the same run. At the end: the dequantize kernel alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton
from _peers import PEERS, Case, make_case, planned
from rich.console import Console
from rich.table import Table

import awq_core
from awq_core.explain import plan_line

LAYER = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
SHAPES = LAYER | {"k": (4096, 1024), "small": (896, 896)}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
OURS, DENSE, BEST = "awq-core", "dense", "humming"
CONSOLE = Console(width=170)

Times = dict[str, dict[int, float]]


def graph_us(calls: list[Callable[[], object]], rounds: int = 7) -> float:
    """Median microseconds of one call, over replays of a graph of at least 24."""
    calls = calls * -(-24 // len(calls))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_us([lambda: target.copy_(source)]) * 1e-6)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """||y - exact|| / ||exact||."""
    return float((y.double() - exact).norm() / exact.norm())


def measure(case: Case, peers: list[str], rows: list[int]) -> tuple[Times, float]:
    """Microseconds by peer and M, and our worst relative error."""
    times: Times = {}
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    inputs = {m: torch.randn(m, case.spec.in_features, generator=generator).to("cuda", case.dtype) for m in rows}
    for peer in peers:
        prepare, most = PEERS[peer]
        calls = prepare(case)
        if calls is None:
            continue
        times[peer] = {}
        for m in (m for m in rows if m <= most):
            try:
                ready = calls(inputs[m])
                poison = torch.full((64 << 20,), float("nan"), device="cuda")
                del poison  # what the caching allocator hands out next is NaN
                wrong = error(ready[0](), inputs[m].double() @ case.exact.double())
                if not wrong < 5e-2:
                    raise ArithmeticError(f"relative error {wrong:.1e}")
                worst = max(worst, wrong) if peer == OURS else worst
                times[peer][m] = graph_us(ready)
            except Exception as failure:  # a peer that fails must not end the run; one of ours must
                if peer.startswith(OURS):
                    raise
                CONSOLE.print(f"{peer} at M={m}: {failure!r}"[:300])
        del calls
        torch.cuda.empty_cache()
    return times, worst


def show(title: str, times: Times, rows: list[int], work: dict[str, Callable[[int], float]]) -> None:
    """One table: microseconds by peer, ratios, and what ``work`` makes of our time."""
    table = Table(title, *map(str, rows))
    for peer, found in times.items():
        table.add_row(peer, *(f"{found[m]:.1f}" if m in found else "" for m in rows))
    ours = times[OURS]
    for peer in (DENSE, BEST):
        if peer in times:
            ratios = (f"{ours[m] / times[peer][m]:.2f}" if m in times[peer] else "" for m in rows)
            table.add_row(f"ratio to {peer}", *ratios)
    for name, of in work.items():
        table.add_row(name, *(f"{of(m):.0f}" for m in rows))
    CONSOLE.print(table)


def dequantizing(cases: dict[str, Case], bandwidth: float) -> dict[str, dict[str, float]]:
    """The dequantize kernel alone: microseconds, and percent of the bandwidth of a copy."""
    table = Table("dequantize", "us", "GB/s", "% of a copy")
    found = {}
    for shape, case in cases.items():
        plan, first = planned(case)
        size = case.packed + 2 * case.exact.numel()
        copies = [first, *({k: t.clone() for k, t in first.items()} for _ in range(case.copies(size)))]
        calls = [partial(plan.resident.dequantize, case.spec, tensors, case.dtype) for tensors in copies]
        wrong = error(calls[0](), case.exact.double())
        if not wrong < 5e-3:
            raise ArithmeticError(f"dequantize is wrong: relative error {wrong:.1e}")
        us = graph_us(calls)
        rate = size / us * 1e6
        found[shape] = {"us": us, "of_copy": rate / bandwidth}
        table.add_row(shape, f"{us:.1f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}")
    CONSOLE.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    peers, rows = [OURS, *(p for p in args.peers if p != OURS)], args.rows
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    CONSOLE.print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, awq-core {awq_core.__version__}, "
        f"{args.dtype}, g={args.group_size}, microseconds; a copy moves {bandwidth / 1e9:.0f} GB/s"
    )
    results: dict[str, Times] = {}
    cases: dict[str, Case] = {}
    for shape in args.shapes:
        k, n = SHAPES[shape]
        case = cases[shape] = make_case(k, n, args.group_size, args.dtype)
        times, worst = measure(case, peers, rows)
        results[shape] = times
        work = {
            "% of a copy": lambda m, c=case, t=times: _bytes(c, m) / t[OURS][m] * 1e6 / bandwidth * 100,
            "TFLOP/s": lambda m, k=k, n=n, t=times: 2 * m * k * n / t[OURS][m] * 1e-6,
        }
        show(f"{shape} {k}->{n}", times, rows, work)
        CONSOLE.print(f"{plan_line(planned(case)[0])}; worst relative error {worst:.1e}")
    if set(LAYER) <= set(results):
        total = {
            peer: {m: sum(results[s][peer][m] for s in LAYER) for m in rows if _everywhere(results, peer, m)}
            for peer in peers
            if all(peer in results[s] for s in LAYER)
        }
        moved = sum(_bytes(cases[s], 1) for s in LAYER)
        numbers = sum(k * n for k, n in LAYER.values())
        work = {
            "% of a copy": lambda m: moved / total[OURS][m] * 1e6 / bandwidth * 100,
            "TFLOP/s": lambda m: 2 * m * numbers / total[OURS][m] * 1e-6,
        }
        show("sum of a layer", total, rows, work)
    decoded = dequantizing(cases, bandwidth)
    if args.json:
        about = {"device": name, "torch": torch.__version__, "triton": triton.__version__, "copy": bandwidth}
        args.json.write_text(json.dumps(about | {"results": results, "dequantize": decoded}, indent=1))


def _bytes(case: Case, m: int) -> float:
    """What a product of m rows moves at least."""
    return case.packed + 2 * m * (case.spec.in_features + case.spec.out_features)


def _everywhere(results: dict[str, Times], peer: str, m: int) -> bool:
    return all(m in results[shape][peer] for shape in LAYER)


if __name__ == "__main__":
    main()
