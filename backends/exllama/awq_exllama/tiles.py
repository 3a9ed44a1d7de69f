"""Sizes of the kernels' tiles by number of rows: a guess for any GPU, which ``awq tune`` replaces by measuring."""

from __future__ import annotations

from awq_core.api import LinearSpec
from awq_core.words.tiles import Tile, configs, split_for

MOST_TILED = 50  # as in ExLlama-v2: above, a dense weight is made for the call


def padded_rows(rows: int) -> int:
    """Rows of x in a tile for M rows."""
    return next(size for size in (16, 32, 64) if rows <= size)


def default(spec: LinearSpec, rows: int) -> Tile:
    """The tile for M rows where nothing was measured: on NVIDIA GPUs what was best on an H100 (README.md)."""
    if rows == 1:
        return _tile(spec, 64, 16, 4, 1, 512)
    if spec.device.vendor == "amd":  # a wave32 holds its operands twice: 64 columns or it spills
        return _tile(spec, 64, 16, 4, 3, 384) if rows <= 16 else _tile(spec, 64, 16, 8, 2, 256)
    if rows <= 16:
        return _tile(spec, 128, 16, 4, 3, 528)
    return _tile(spec, 64, 16, 4, 3, 264) if rows <= 32 else _tile(spec, 64, 16, 8, 2, 264)


def candidates(spec: LinearSpec, rows: int) -> list[dict[str, int]]:
    """What ``awq tune`` tries beside the default, as the fields of a Tile."""
    shapes = ((32, 16, 4), (64, 16, 4), (64, 16, 8), (128, 16, 4), (128, 16, 8), (32, 32, 4), (64, 32, 8))
    return configs(
        _tile(spec, columns, words, warps, stages, fill)
        for columns, words, warps in shapes
        for fill in (1, 384, 1024)
        for stages in ((1,) if rows == 1 else (2, 3))
    )


def _tile(spec: LinearSpec, columns: int, words: int, warps: int, stages: int, fill: int) -> Tile:
    """A tile with K split so that about ``fill`` programs run; all rows are in one."""
    split = split_for(spec, -(-spec.out_features // columns), words, fill)
    return Tile(columns, words, warps, stages, split)
