"""Charts of what ``gpu_linear.py --json`` measured: microseconds against M, a panel a shape, a line a kernel.

    python benchmarks/gpu_linear.py --json linears.json
    python benchmarks/plot_gpu_linear.py linears.json

The chart is written beside its JSON, or into ``--out``. It measures nothing: without arguments it draws nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FIRST = "awq-core"  # drawn thick
SUM = "all of a layer"
LAYER = ("qkv", "o", "gate_up", "down")


Results = dict[str, dict[str, dict[str, float]]]


def with_sum(results: Results) -> Results:
    """The shapes, and the sum of those of a layer by kernel for every M that all of them have."""
    layer = [results[shape] for shape in LAYER if shape in results]
    if len(layer) < len(LAYER):
        return results
    total = {
        name: {m: sum(shape[name][m] for shape in layer) for m in rows if all(m in shape[name] for shape in layer)}
        for name, rows in layer[0].items()
        if all(name in shape for shape in layer)
    }
    return results | {SUM: total}


def draw(data: dict[str, Any], title: str, file: Path) -> Path:
    """Write the chart of one JSON document into ``file`` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = with_sum(data["results"])
    names = list(dict.fromkeys(name for kernels in panels.values() for name in kernels))
    columns = -(-len(panels) // 2)
    figure, grid = pyplot.subplots(2, columns, figsize=(4.2 * columns, 7), layout="constrained", squeeze=False)
    for axes, (shape, kernels) in zip(grid.flat, panels.items(), strict=False):
        for name, times in kernels.items():  # a colour each, whichever are missing in a panel
            rows = sorted(map(int, times))
            width = 2.2 if name == FIRST else 1.2
            axes.plot(
                rows,
                [times[str(m)] for m in rows],
                marker="o",
                markersize=3,
                linewidth=width,
                label=name,
                color=f"C{names.index(name)}",
            )
        axes.set(title=shape, xlabel="M", ylabel="µs")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    grid[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    partial = file.with_name(f".{file.name}")
    figure.savefig(partial, dpi=140, format="png")
    partial.replace(file)
    pyplot.close(figure)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help="JSON of gpu_linear.py")
    parser.add_argument("--out", type=Path, help="folder of the charts (default: beside each file)")
    args = parser.parse_args()
    if not args.files:
        print("no JSON of gpu_linear.py is named: nothing is drawn")
        return
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("charts need matplotlib: pip install 'awq-core[plot]'") from None
    for file in args.files:
        try:
            data = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise SystemExit(f"{file} cannot be read: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("results"), dict) or not data["results"]:
            raise SystemExit(f"{file} holds no results of gpu_linear.py")
        folder = args.out or file.parent
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{data.get('device', '?')}, torch {data.get('torch', '?')}: {file.stem}"
        print(f"{draw(data, title, folder / f'{file.stem}.png')} is written")


if __name__ == "__main__":
    main()
