"""Tile sizes by number of rows, as measured on an H100 (README.md); a guess elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of y^T: ``m`` rows of x by ``n`` columns; ``fill`` is the number of programs that splitting K aims at."""

    m: int
    n: int
    warps: int
    stages: int
    scale_late: bool
    fill: int


TILES = (
    (16, Tile(16, 64, 4, 3, True, 384)),
    (32, Tile(32, 128, 8, 3, False, 192)),
    (64, Tile(64, 128, 8, 3, False, 128)),
)
LARGEST = Tile(128, 128, 8, 3, False, 128)


def tile_for(rows: int) -> Tile:
    """The tile for M rows."""
    return next((tile for most, tile in TILES if rows <= most), LARGEST)


def split_for(tile: Tile, rows: int, in_features: int, out_features: int) -> int:
    """Into how many parts (a power of 2, at most 8) K is split, so that few tiles still fill the device."""
    tiles = -(-out_features // tile.n) * -(-rows // tile.m)
    blocks = -(-in_features // 128)
    split = 1
    while split < 8 and tiles * split < tile.fill and split * 2 <= blocks:
        split *= 2
    return split
