"""The guide's two charts: forward peak memory by batch size, and generate throughput by batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import AwqError
from .run import Report, Row

GB = 2**30
MEMORY, THROUGHPUT = "forward_memory.png", "generate_throughput.png"
COLOURS = {"dense": "#7f7f7f", "unfused": "#1f77b4", "fused": "#d62728"}


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files only; AwqError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise AwqError("charts need matplotlib: pip install 'awq-core[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def write_plots(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write both charts into ``folder`` (made if need be); returns their files.

    For each batch size the first case that has it counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = report.rows[0].case
    lengths = f"prefill {first.prefill}, decode {first.decode}"
    title = f"{report.source}, {report.dtype}\n{report.device}"
    memory = "forward peak memory, GB" if report.on_gpu else "memory of the process (RAM), GB"
    return (
        _chart(report, folder / MEMORY, "forward", f"{memory} ({lengths})", title),
        _chart(report, folder / THROUGHPUT, "generate", f"generate(), tokens/s ({lengths})", title),
    )


def _value(row: Row, kind: str) -> float | None:
    if row.speed is None:
        return None
    return row.speed.forward_memory / GB if kind == "forward" else row.speed.generate_rate


def _chart(report: Report, file: Path, kind: str, label: str, title: str) -> Path:
    """Grouped bars: a group a batch size, a bar a variant."""
    plt = pyplot()
    batches = list(dict.fromkeys(row.case.batch_size for row in report.rows))
    variants = [name for name in COLOURS if any(row.variant == name for row in report.rows)]
    figure, axes = plt.subplots(figsize=(1.5 + 1.6 * max(3, len(batches)), 4.5), layout="constrained")
    width = 0.8 / len(variants)
    for place, name in enumerate(variants):
        rows = {row.case.batch_size: row for row in reversed([r for r in report.rows if r.variant == name])}
        heights = [_value(rows[batch], kind) or 0.0 if batch in rows else 0.0 for batch in batches]
        at = [number + (place - (len(variants) - 1) / 2) * width for number in range(len(batches))]
        bars = axes.bar(at, heights, width, label=name, color=COLOURS[name])
        axes.bar_label(bars, ["-" if not h else f"{h:.0f}" if h >= 100 else f"{h:.3g}" for h in heights], fontsize=8)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch size")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=9)
    axes.legend()
    partial = file.with_name(f".{file.name}")
    try:
        figure.savefig(partial, dpi=150, format="png")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
        plt.close(figure)
    return file
