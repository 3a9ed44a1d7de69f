"""Sizes of the kernels' tiles by number of rows: a guess for any GPU, which ``awq tune`` replaces by measuring."""

from __future__ import annotations

from dataclasses import dataclass

from awq_core.api import LinearSpec

MOST_TILED = 50  # as in ExLlama-v2: above, a dense weight is made for the call
LONGEST_SPLIT = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """``columns`` of the weight by ``words`` of each in one step; ``split`` is the number of parts of K."""

    columns: int
    words: int
    warps: int
    stages: int
    split: int


def split_for(spec: LinearSpec, columns: int, words: int, fill: int) -> int:
    """Into how many parts (a power of 2) K is split, so that about ``fill`` programs run."""
    programs, steps = -(-spec.out_features // columns), -(-spec.in_features // (8 * words))
    split = 1
    while split < LONGEST_SPLIT and programs * split < fill and split * 2 <= steps:
        split *= 2
    return split


def padded_rows(rows: int) -> int:
    """Rows of x in a tile for M rows."""
    return next(size for size in (16, 32, 64) if rows <= size)


def default(spec: LinearSpec, rows: int) -> Tile:
    """The tile for M rows where nothing was measured."""
    if rows == 1:
        return Tile(64, 16, 4, 1, split_for(spec, 64, 16, 512))
    if rows <= 16:
        return Tile(64, 16, 4, 3, split_for(spec, 64, 16, 384))
    columns = 64 if spec.device.vendor == "amd" else 128  # a wave32 holds its operands twice: 64 or it spills
    return Tile(columns, 16, 8, 2, split_for(spec, columns, 16, 256))


def candidates(spec: LinearSpec, rows: int) -> list[dict[str, int]]:
    """What ``awq tune`` tries beside the default, as the fields of a Tile."""
    found: dict[Tile, None] = {}
    for columns, words, warps in ((32, 16, 4), (64, 16, 4), (64, 16, 8), (128, 16, 8), (32, 32, 4), (64, 32, 8)):
        for fill in (1, 384, 1024):
            for stages in (1,) if rows == 1 else (2, 3):
                found[Tile(columns, words, warps, stages, split_for(spec, columns, words, fill))] = None
    return [{name: getattr(tile, name) for name in Tile.__slots__} for tile in found]
