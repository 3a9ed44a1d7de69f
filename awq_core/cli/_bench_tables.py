"""What ``awq bench`` prints: the guide's tables, one that sets the variants side by side, and the same as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..bench.run import Report, Row

GB = 2**30
TITLES = {"unfused": "Unfused module", "fused": "Fused module", "dense": "Dense model"}


def print_report(report: Report) -> None:
    """All tables on stdout."""
    from ._output import console, table

    screen = console()
    memory = "Memory (VRAM)" if report.on_gpu else "Memory (RAM)"
    columns = f">Batch Size | >Prefill Length | >Decode Length | >Prefill tokens/s | >Decode tokens/s | {memory}"
    for variant, title in TITLES.items():
        rows = [row for row in report.rows if row.variant == variant]
        if rows:
            screen.print(table(title, columns, (guide_cells(report, row) for row in rows)))
    if report.rows:
        screen.print(_side_by_side(report))
    for line in _captions(report):
        screen.print(line, soft_wrap=True)


def guide_cells(report: Report, row: Row) -> tuple[object, ...]:
    """A line of the guide's table: numbers with six digits, memory in GB of 2^30 bytes and as a share of the whole."""
    case, speed = row.case, row.speed
    lengths = (case.batch_size, case.prefill, case.decode)
    if speed is None:
        return (*lengths, "-", "-", row.error)
    share = speed.memory / report.total_memory
    memory = f"{speed.memory / GB:.2f} GB ({share:.2%})"
    return (
        *lengths,
        f"{speed.prefill_rate:g}",
        "-" if speed.generate_rate is None else f"{speed.generate_rate:g}",
        memory,
    )


def _side_by_side(report: Report) -> Any:
    """Decode tokens/s of ``generate()`` by variant, with the floors."""
    from ._output import table

    variants = [name for name in ("dense", "unfused", "fused") if any(row.variant == name for row in report.rows)]
    heads = [f">{name}" for name in variants]
    if {"unfused", "fused"} <= set(variants):
        heads.append(">fused / unfused")
    if "dense" in variants:
        heads.append(">floor, dense")
    quantized = [name for name in variants if name != "dense"]
    if quantized:
        heads += [">floor, AWQ", f">{quantized[-1]} / floor"]

    def lines() -> Iterator[tuple[object, ...]]:
        for case in dict.fromkeys(row.case for row in report.rows):
            rows = {name: row for name in variants if (row := report.at(name, case)) is not None}
            rate = {name: row.speed.generate_rate for name, row in rows.items() if row.speed is not None}
            floor = {name: row.floor for name, row in rows.items() if row.floor is not None}
            cells = [_number(rate.get(name)) for name in variants]
            if {"unfused", "fused"} <= set(variants):
                cells.append(_ratio(rate.get("fused"), rate.get("unfused"), "x"))
            if "dense" in variants:
                cells.append(_number(floor.get("dense")))
            if quantized:
                cells += [_number(floor.get(quantized[-1])), _ratio(rate.get(quantized[-1]), floor.get(quantized[-1]))]
            yield case.batch_size, case.prefill, case.decode, *cells

    columns = ">Batch Size | >Prefill Length | >Decode Length | " + " | ".join(heads)
    return table("Decode tokens/s side by side", columns, lines())


def _captions(report: Report) -> Iterator[str]:
    yield f"{report.source}; {report.dtype} on {report.device}"
    yield ", ".join(f"{name} {version}" for name, version in report.versions.items())
    width = report.bandwidth
    measured = f"copy {width.copy / 1e9:.0f}, read {width.read / 1e9:.0f}, measured in this run"
    yield (
        f"floor: {width.best / 1e9:.0f} GB/s ({measured}) over the bytes that a step must read: "
        "weights, scales, zeros, lm_head, and the cache at mean length"
    )
    if not report.on_gpu:
        yield "Memory (RAM) is the resident size of the whole process, with Python and its libraries"
    for made in report.made:
        yield (
            f"{made.variant}: {made.memory / GB:.2f} GB of weights, made in {made.load_seconds:.1f} s, "
            f"first answer of two tokens after {made.first_answer_seconds:.1f} s more"
        )
        if made.note is not None:
            yield made.note
    yield from report.notes


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ratio(one: float | None, other: float | None, unit: str = "%") -> str:
    if one is None or not other:
        return "-"
    return f"{one / other:.2f}x" if unit == "x" else f"{one / other:.0%}"


def as_data(report: Report) -> dict[str, Any]:
    """The whole report as plain data; seconds, bytes, tokens per second."""
    return {
        "source": report.source,
        "device": report.device,
        "dtype": report.dtype,
        "total_memory_bytes": report.total_memory,
        "memory_is": "peak of torch's allocations" if report.on_gpu else "resident size of the process",
        "bandwidth_bytes_per_second": {"read": report.bandwidth.read, "copy": report.bandwidth.copy},
        "versions": report.versions,
        "notes": list(report.notes),
        "models": [
            {
                "variant": made.variant,
                "memory_bytes": made.memory,
                "load_seconds": made.load_seconds,
                "first_answer_seconds": made.first_answer_seconds,
                "note": made.note,
            }
            for made in report.made
        ],
        "rows": [_row_data(row) for row in report.rows],
    }


def _row_data(row: Row) -> dict[str, Any]:
    case, speed = row.case, row.speed
    data: dict[str, Any] = {
        "variant": row.variant,
        "batch_size": case.batch_size,
        "prefill_length": case.prefill,
        "decode_length": case.decode,
        "floor_tokens_per_second": row.floor,
        "error": row.error,
    }
    if speed is None:
        return data
    return data | {
        "prefill_tokens_per_second": speed.prefill_rate,
        "decode_tokens_per_second": speed.generate_rate,
        "decode_loop_tokens_per_second": speed.loop_rate,
        "prefill_seconds": speed.prefill_seconds,
        "generate_seconds": speed.generate_seconds,
        "decode_loop_seconds": speed.loop_seconds,
        "forward_memory_bytes": speed.forward_memory,
        "memory_bytes": speed.memory,
    }
