"""The CPU kernels against a dense linear of the same dtype, in one run: ``python benchmarks/cpu_linear.py --help``.

Weights are rotated through copies of 300 MB of dense weight and more, so that none is in the cache when its turn
comes. Times are of one linear. The sums are over the seven linears of a layer of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from awq_core.api import Device, Kernel, LinearSpec, Weight
from awq_cpu.plugin import BACKEND

SMOLLM2 = {(576, 576): 2, (192, 576): 2, (1536, 576): 2, (576, 1536): 1}  # (N, K): how many in a layer
LARGE = {(4096, 4096): 1, (14336, 4096): 1}
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
GROUP = 64
ROTATED_BYTES = 300e6

Run = Callable[[torch.Tensor], object]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def checkpoint(n: int, k: int) -> dict[str, torch.Tensor]:
    """A random weight in the gemm layout."""

    def words(rows: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, n // 8), dtype=torch.int32)

    scales = (torch.rand(k // GROUP, n) * 0.01 + 0.005).to(torch.float16)
    return {"qweight": words(k), "qzeros": words(k // GROUP), "scales": scales}


def contenders(n: int, k: int, dtype: str) -> dict[str, list[Run]]:
    """For each name the same linear as many times as there are copies, each with a weight of its own."""
    spec = LinearSpec(k, n, GROUP, dtype=dtype, device=Device.parse("cpu"))
    torch_dtype = getattr(torch, dtype)
    copies = max(2, int(ROTATED_BYTES / (n * k * torch_dtype.itemsize)) + 1)
    resident = next(
        lay for lay in BACKEND.layouts if lay.name == ("cpu_int4pack" if dtype == "bfloat16" else "cpu_dense")
    )
    tensors = resident.prepare(spec, checkpoint(n, k))
    weights = [Weight(spec, resident, {name: t.clone() for name, t in tensors.items()}) for _ in range(copies)]
    dense = resident.dequantize(spec, tensors, torch_dtype).t().contiguous()
    found = {"torch": [bind_dense(dense.clone()) for _ in range(copies)]}
    for kernel in BACKEND.kernels:
        if kernel.reads == resident.name:
            found[kernel.name] = [bind_kernel(kernel, weight) for weight in weights]
    return found


def bind_dense(weight: torch.Tensor) -> Run:
    return lambda x: torch.nn.functional.linear(x, weight)


def bind_kernel(kernel: Kernel, weight: Weight) -> Run:
    return lambda x: kernel.apply(weight, x, None)


def measure(runs: dict[str, list[Run]], x: torch.Tensor, seconds: float) -> dict[str, tuple[float, float]]:
    """Median and best in ms of one call; the contenders take turns, so that a busy machine hits them alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    turn = 0
    stop = time.perf_counter() + seconds
    while turn < 7 or time.perf_counter() < stop:
        for name, copies in runs.items():
            run = copies[turn % len(copies)]
            start = time.perf_counter()
            run(x)
            times[name].append((time.perf_counter() - start) * 1e3)
        turn += 1
    return {name: (statistics.median(t[2:]), min(t[2:])) for name, t in times.items()}


def table(title: str, shapes: dict[tuple[int, int], int], dtype: str, rows: Sequence[int], seconds: float) -> None:
    print(f"\n{title}, {dtype}, group size {GROUP}: ms median/best, and the speed of each kernel against torch")
    sums: dict[int, dict[str, tuple[float, float]]] = {}
    for (n, k), count in shapes.items():
        runs = contenders(n, k, dtype)
        for m in rows:
            found = measure(runs, torch.randn(m, k, dtype=getattr(torch, dtype)), seconds)
            print(line(f"N={n} K={k} M={m}", found), flush=True)
            total = sums.setdefault(m, dict.fromkeys(found, (0.0, 0.0)))
            for name, (median, best) in found.items():
                total[name] = (total[name][0] + count * median, total[name][1] + count * best)
    if sum(shapes.values()) > len(shapes):
        for m, total in sums.items():
            print(line(f"sum of {sum(shapes.values())} linears M={m}", total), flush=True)


def line(label: str, found: dict[str, tuple[float, float]]) -> str:
    base = found["torch"]
    parts = [f"{label:32}"]
    for name, (median, best) in found.items():
        speed = "" if name == "torch" else f" {base[0] / median:.2f}x/{base[1] / best:.2f}x"
        parts.append(f"{name} {median:8.3f}/{best:8.3f}{speed}")
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=["smollm2", "large"], choices=["smollm2", "large"])
    parser.add_argument("--seconds", type=float, default=0.4, help="for each shape and M")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {args.threads} threads, torch {torch.__version__}")
    with torch.inference_mode():
        for dtype in args.dtypes:
            if "smollm2" in args.shapes:
                table("SmolLM2-135M", SMOLLM2, dtype, args.rows, args.seconds)
            if "large" in args.shapes:
                table("Large", LARGE, dtype, args.rows, args.seconds)


if __name__ == "__main__":
    main()
