"""GPU kernels by shape and M: ours (as the dispatcher plans them) beside fp16 `torch.matmul`, tinygemm and humming.

Shapes are the linears of Llama-3-8B / Mistral-7B, q+k+v and gate+up joined. Weights rotate over enough copies that the
L2 does not help; at least 24 calls are captured in one CUDA graph, whose replays are timed (median). Every result is
checked against float64 on the dequantized weight, on poisoned output memory.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

import awq_core
from awq_core.explain import plan_line
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.ops import apply_plan
from awq_core.selection import select
from awq_core.spec import Device, LinearSpec
from awq_core.testing.data import random_codes

SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
L2_BYTES = 280e6


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


def copies_of(packed_bytes: float) -> int:
    """How many copies of a weight are more than the L2 holds."""
    return max(2, int(L2_BYTES / packed_bytes) + 1)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """||y - exact|| / ||exact||."""
    return float((y.double() - exact).norm() / exact.norm())


def humming_layer(
    stored: dict[str, torch.Tensor], k: int, n: int, group_size: int, dtype: torch.dtype
) -> object | None:
    """The peer humming-kernels with this weight, where it is installed."""
    try:
        from humming.layer import HummingLayer
    except ImportError:
        return None
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    layer = HummingLayer(shape_n=n, shape_k=k, weight_config=config, torch_dtype=dtype).cuda()
    layer.load_from_tensors({"qweight": stored["qweight"], "qzeros": stored["qzeros"], "scales": stored["scales"]})
    layer.transform()
    return layer


def humming_call(layer: object, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One call, with the configuration that humming's heuristics name for exactly this M."""
    from humming.tune import get_heuristics_config

    config = get_heuristics_config(layer.humming_config, shape_m=x.shape[0])
    return lambda: layer(x, tuning_config=config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    dtype = getattr(torch, args.dtype)
    device = torch.device("cuda")
    console = Console(width=150)
    name = torch.cuda.get_device_name()
    console.print(
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, awq-core {awq_core.__version__}, "
        f"{args.dtype}, g={args.group_size}, microseconds"
    )
    results: dict[str, dict[str, dict[int, float]]] = {}
    for shape, (k, n) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        spec = LinearSpec(k, n, args.group_size, dtype=args.dtype, device=Device.of(device))
        plan = select(spec)
        codes = random_codes(spec, generator)
        stored = {key: t.to(device) for key, t in checkpoint_layout("gemm").pack(codes).items()}
        exact_weight = dequantize(codes, torch.float32).to(device)
        first = plan.resident.prepare(spec, stored)
        ours = [first] + [{key: t.clone() for key, t in first.items()} for _ in range(copies_of(k * n / 2))]
        dense = [exact_weight.to(dtype).T.contiguous() for _ in range(copies_of(k * n * 2))]
        rows_table = Table(f"{shape} {k}->{n}", *map(str, args.rows))
        times: dict[str, dict[int, float]] = {"awq-core": {}, "dense": {}, "tinygemm bf16": {}, "humming": {}}
        layer = humming_layer(stored, k, n, args.group_size, dtype)
        layers = [layer, *(copy.deepcopy(layer) for _ in ours[1:])] if layer is not None else []
        tiny_weight = tiny_scale = None
        if args.group_size in (32, 64, 128, 256):
            q = codes.codes.T.contiguous().to(device)
            packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
            scale = codes.scales.float().to(device)
            pair = (
                torch.stack([scale, (8 - codes.zeros.to(device).float()) * scale], -1).to(torch.bfloat16).contiguous()
            )
            tiny_weight = [packed.clone() for _ in ours]
            tiny_scale = pair
        worst = 0.0
        for m in args.rows:
            x = torch.randn(m, k, generator=generator).to(device, dtype)
            exact = x.double() @ exact_weight.double()
            poison = torch.full((64 << 20,), float("nan"), device=device)
            del poison  # what the caching allocator hands out next is NaN
            worst = max(worst, error(apply_plan(plan, first, x, None), exact))
            times["awq-core"][m] = graph_us([lambda t=t, x=x, plan=plan: apply_plan(plan, t, x, None) for t in ours])
            times["dense"][m] = graph_us([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
            if layers:
                try:
                    peer_error = error(humming_call(layers[0], x)(), exact)
                    assert peer_error < 5e-2, f"humming is wrong: {peer_error}"
                    times["humming"][m] = graph_us([humming_call(other, x) for other in layers])
                except Exception as failure:
                    console.print(f"humming at M={m}: {failure!r}"[:300])
            if tiny_weight is not None and m <= 64:
                xb = x.bfloat16()
                times["tinygemm bf16"][m] = graph_us(
                    [
                        lambda w=w, x=xb, s=tiny_scale: torch.ops.aten._weight_int4pack_mm(x, w, args.group_size, s)
                        for w in tiny_weight
                    ]
                )
        for peer, by_rows in times.items():
            rows_table.add_row(peer, *(f"{by_rows[m]:.1f}" if m in by_rows else "" for m in args.rows))
        console.print(rows_table)
        console.print(f"{plan_line(plan)}; worst relative error {worst:.1e}")
        results[shape] = times
        del ours, dense, tiny_weight, layers
        torch.cuda.empty_cache()
    total = Table("sum of a layer", *map(str, args.rows))
    for peer in ("awq-core", "dense", "tinygemm bf16", "humming"):
        sums = [sum(results[s][peer].get(m, float("nan")) for s in SHAPES) for m in args.rows]
        total.add_row(peer, *(f"{value:.1f}" if value == value else "" for value in sums))
    console.print(total)
    if args.json:
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    main()
