"""``gemm.hopper`` in every way in which it could do a problem, beside the one that its model of the time chooses.

    python benchmarks/hopper_tiles.py --json benchmarks/results/hopper-tiles-h100.json

Weights rotate and calls are captured as in ``gpu_linear.py``. What the model chooses and what was fastest stand in the
table; the JSON has all of them, for fitting the model.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from _peers import dense, make_case, planned
from gpu_linear import CONSOLE, SHAPES, error, graph_us
from rich.table import Table

from awq_core.api import Weight
from awq_gemm import hopper_launch, launch
from awq_gemm.hopper_tiles import WAYS, Work, work_for, works


def name_of(work: Work) -> str:
    """Tile, programs, tiles that are shared out."""
    return f"{work.way.n}x{work.way.m} {work.programs} {work.shared}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    found: dict[str, dict[str, float]] = {}
    table = Table("problem", "dense", "tiles", "chosen", "us", "fastest", "us")
    for shape in args.shapes:
        k, n = SHAPES[shape]
        case = make_case(k, n, 128, "float16")
        plan, first = planned(case, "gemm")
        copies = [first, *({key: t.clone() for key, t in first.items()} for _ in range(case.copies(case.packed) - 1))]
        weights = [Weight(case.spec, plan.resident, tensors) for tensors in copies]
        plain = dense(case)
        for rows in args.rows:
            x = torch.randn(rows, k, device="cuda", dtype=case.dtype)
            exact = x.double() @ case.exact.double()
            times = {"dense": round(graph_us(plain(x)), 2)}
            if rows <= 512 or work_for(rows, k, n, processors) is None:
                times["tiles"] = round(graph_us([partial(launch.matmul, weight, x, None) for weight in weights]), 2)
            for way in WAYS:
                for work in works(way, rows, k, n, processors):
                    calls = [partial(hopper_launch.run, weight, x, work) for weight in weights]
                    first_y, wrong = calls[0](), error(calls[0](), exact)
                    if not wrong < 1e-3 or not torch.equal(first_y, calls[0]()):
                        raise ArithmeticError(f"{shape} {rows} {name_of(work)}: {wrong:.1e}, or two runs differ")
                    times[name_of(work)] = round(graph_us(calls, 5), 2)
            found[f"{shape} {rows}"] = times
            chosen = work_for(rows, k, n, processors)
            mine = "tiles" if chosen is None else name_of(chosen)
            best = min((us, name) for name, us in times.items() if name != "dense")
            table.add_row(
                f"{shape} {rows}", f"{times['dense']:.1f}", f"{times.get('tiles', 0):.1f}", mine,
                f"{times.get(mine, 0):.1f}", best[1], f"{best[0]:.1f}",
            )  # fmt: skip
        del weights, copies, plain, first
        torch.cuda.empty_cache()
    CONSOLE.print(table)
    if args.json is not None:
        lines = [f" {json.dumps(problem)}: {json.dumps(times)}" for problem, times in found.items()]
        args.json.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
