"""Charts of the results that lie in benchmarks/results."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svg import COLOURS, SOFT, STRONG, Picture

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SMALL = "SmolLM2-135M-Instruct"
LAYER = ("qkv", "o", "gate_up", "down")
Lines = Mapping[str, Mapping[int, float]]


def pictures() -> dict[str, str]:
    """File name to SVG, one for each result that can be drawn."""
    made: dict[str, str] = {}
    for file in sorted(RESULTS.glob("gpu-linear-*.json")):
        found = json.loads(file.read_text())
        lines = _sum_of_linears({name: times for name, times in found["results"].items() if name in LAYER})
        dtype = "bfloat16" if "bf16" in file.stem else "float16"
        title = f"Four linears of a Llama-3-8B layer, {dtype}, g=128, on {found['device']}"
        made[f"chart-{file.stem}.svg"] = lines_chart(title, "rows of the activation (M)", "microseconds", lines)
    for file in sorted(RESULTS.glob("generate-*.txt")):
        bars = _generate(file.read_text("utf-8"))
        if bars:
            title = f"{SMALL}, tokens/s ({file.stem.removeprefix('generate-')})"
            made[f"chart-{file.stem}.svg"] = bars_chart(title, bars)
    for file in sorted(RESULTS.glob("quantize-*.json")):
        found = json.loads(file.read_text())
        title = f"{found['about'].get('model', SMALL)}, KL from the dense model in nats; shorter is better"
        made[f"chart-{file.stem}.svg"] = bars_chart(title, _quantize(found["rows"]))
    for file in sorted(RESULTS.glob("cpu-decode-*.txt")):
        bars = _cpu_decode(file.read_text("utf-8"))
        made[f"chart-{file.stem}.svg"] = bars_chart(f"{SMALL}, decoding one sequence", {"tokens/s": bars})
    for file in sorted(RESULTS.glob("decode-*.json")):
        found = json.loads(file.read_text())
        title = f"Mistral-7B with random weights, fused, decode tokens/s, on {found['device']}"
        made[f"chart-{file.stem}.svg"] = bars_chart(title, _decode(found["rows"]))
    return made


def _quantize(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean KL over the seeds, by group size and method."""
    names = {"rtn": "rounding to nearest", "paper": "the paper's search", "awq-core": "awq-core"}
    found: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        if row["method"] in names:
            found.setdefault(row["group"], {}).setdefault(names[row["method"]], []).append(row["kl"])
    return {
        f"groups of {group}": {name: round(statistics.mean(values), 4) for name, values in found[group].items()}
        for group in sorted(found, reverse=True)
    }


def _cpu_decode(text: str) -> dict[str, float]:
    """Median tokens/s of ``generate()`` by model, of the raw loop where there is no other; out of the first table."""
    table = text[text.index("decode, generate()") :].partition("└")[0]
    found: dict[str, float] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            name, _, generated, raw = cells
            found[name] = float((generated or raw).split()[0])
    return found


def _decode(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Tokens/s by batch and prompt: the fast step, and transformers' own forward with the same kernels."""
    return {
        f"batch {row['batch']}, prompt {row['prefill']}": {
            "generate()": round(row["generate_tok_s"]),
            "transformers' forward": round(row["hf_tok_s"]),
        }
        for row in rows
        if "hf_tok_s" in row
    }


def _sum_of_linears(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[int, float]]:
    """Microseconds by M of each contender, summed over the linears that all have it."""
    sums: dict[str, dict[int, float]] = {}
    for contender in next(iter(results.values())):
        columns = [{int(m): value for m, value in linear[contender].items()} for linear in results.values()]
        sums[contender] = {
            m: sum(column[m] for column in columns) for m in sorted(set.intersection(*map(set, columns)))
        }
    return sums


def _generate(text: str) -> dict[str, dict[str, float]]:
    """Medians by group ("bfloat16, decode 48") and model, out of the tables that ``generate.py`` prints."""
    found: dict[str, dict[str, float]] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if cells[:2] == ["dtype", "model"]:
            columns = cells
        elif cells:
            for name, cell in zip(columns[3:], cells[3:], strict=True):
                found.setdefault(f"{cells[0]}, {name}", {})[cells[1]] = float(cell.split()[0])
    return found


def lines_chart(title: str, x_name: str, y_name: str, lines: Lines) -> str:
    """Lines on two logarithmic axes."""
    made = Picture(760, 440, title)
    left, right, top, bottom = 70, 590, 50, 380
    xs = sorted({x for line in lines.values() for x in line})
    ys = [y for line in lines.values() for y in line.values()]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))

    def at_x(x: float) -> float:
        return left + (right - left) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])

    def at_y(y: float) -> float:
        return bottom - (bottom - top) * math.log(y / low) / math.log(high / low)

    made.text(16, 26, title, 14, bold=True)
    for x in (x for x in xs if x & (x - 1) == 0):
        made.path([(at_x(x), top), (at_x(x), bottom)], "#e4e7eb", 1)
        made.text(at_x(x), bottom + 18, str(x), 11, SOFT, "middle")
    power = low
    while power <= high:
        for y in (power, 2 * power, 5 * power):
            if y <= high:
                made.path([(left, at_y(y)), (right, at_y(y))], "#e4e7eb", 1)
                made.text(left - 8, at_y(y) + 4, f"{y:g}", 11, SOFT, "end")
        power *= 10
    made.text((left + right) / 2, bottom + 42, x_name, 12, SOFT, "middle")
    made.text(left, top - 8, y_name, 12, SOFT)
    for number, (name, line) in enumerate(lines.items()):
        points = [(at_x(x), at_y(y)) for x, y in line.items()]
        made.path(points, STRONG[number], 2.5)
        for point in points:
            made.dot(*point, 3, STRONG[number])
        made.box(right + 20, top + 4 + 24 * number, 14, 14, STRONG[number])
        made.text(right + 42, top + 15 + 24 * number, name, 12)
    return str(made)


def bars_chart(title: str, groups: Mapping[str, Mapping[str, float]]) -> str:
    """Horizontal bars, those of a group beside each other and scaled to its longest: groups differ in magnitude."""
    names = sorted({name for group in groups.values() for name in group})
    height = 22 * len(names) + 26
    made = Picture(760, 60 + height * len(groups), title)
    made.text(16, 26, title, 14, bold=True)
    for number, (group, values) in enumerate(groups.items()):
        y = 52 + number * height
        made.text(180, y + 18, group, 12, anchor="end")
        for at, name in enumerate(name for name in names if name in values):
            width = 380 * values[name] / max(values.values())
            made.box(192, y + 22 * at, width, 19, COLOURS[names.index(name)])
            made.text(200, y + 22 * at + 14, name, 11)
            beside = 192 + max(width, 14 + 6.8 * len(name)) + 8  # a name may be longer than its bar
            made.text(beside, y + 22 * at + 14, f"{values[name]:g}", 12)
    return str(made)
