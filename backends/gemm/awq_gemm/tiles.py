"""Tile sizes by shape, as measured on an H200 (README.md); a guess elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from awq_core.api import LinearSpec

WIDE, DEEP = 16384, 8192  # columns, and k, from which the first and the last rule hold


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of y^T: ``m`` rows of x by ``n`` columns; ``fill`` is the number of programs that splitting K aims at."""

    m: int
    n: int
    fill: int
    warps: int = 4
    stages: int = 3


def tile_for(rows: int, in_features: int, out_features: int, roomy: bool) -> Tile:
    """The tile for M rows where nothing was measured; ``roomy``: registers hold large tiles of sums (on sm90)."""
    wide, deep = out_features >= WIDE, in_features >= DEEP
    if rows == 1:
        return Tile(8, 128, 256)
    if rows <= 16:
        return Tile(16, 128, 256) if wide and rows <= 8 else Tile(16, 64, 384)
    if rows <= 32:
        return Tile(32, 128, 1) if wide else Tile(32, 64, 512 if deep else 256)
    if rows <= 64:
        return Tile(64, 128, 1, warps=8) if wide and roomy else Tile(64, 64, 256)
    return Tile(64, 128, 256, warps=8) if (wide or deep) and roomy else Tile(64, 64, 256)


def tiles(roomy: bool) -> set[Tile]:
    """Every tile that ``tile_for`` may name."""
    rows, k, n = (1, 8, 16, 32, 64, 128), (DEEP, DEEP - 1), (WIDE, WIDE - 1)
    return {tile_for(m, i, o, roomy) for m in rows for i in k for o in n}


def candidates(spec: LinearSpec, rows: int) -> list[dict[str, int]]:
    """What ``awq tune`` tries beside it, as the fields of a Tile."""
    m = next((size for size in (8, 16, 32) if rows <= size), 64)
    shapes = ((64, 4), (128, 8)) if m == 64 else ((64, 4), (128, 4), (128, 8))  # four warps cannot hold 64 x 128 sums
    return [
        asdict(Tile(m, n, fill, warps, stages)) for n, warps in shapes for fill in (1, 192, 384) for stages in (2, 3, 4)
    ]


def split_for(tile: Tile, rows: int, in_features: int, out_features: int) -> int:
    """Into how many parts (a power of 2, at most 8) K is split, so that few tiles still fill the device."""
    tiles = -(-out_features // tile.n) * -(-rows // tile.m)
    blocks = -(-in_features // 128)
    split = 1
    while split < 8 and tiles * split < tile.fill and split * 2 <= blocks:
        split *= 2
    return split
