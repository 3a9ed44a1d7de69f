"""Tile sizes by shape, as measured on an H200 (README.md); a guess elsewhere."""

from __future__ import annotations

MOST_ROWS = 16
WARPS, STAGES = 4, 3
REGISTERS = 128  # of a thread, so that four programs fit on a multiprocessor
AHEAD = 1  # blocks of 128 k that a program fetches before the kernel before has ended; more delay what that one reads
WIDE = 16384  # columns from which a tile is wider


def tile_for(rows: int, out_features: int) -> tuple[int, int, int]:
    """Columns and rows of a tile, and the number of programs that splitting K aims at."""
    if rows == 1:
        return 128, 8, 256
    if rows <= 8 and out_features >= WIDE:
        return 128, 16, 256
    return 64, 16, 384


def split_for(columns: int, fill: int, in_features: int, out_features: int) -> int:
    """Into how many parts (a power of 2, at most 8) K is split, so that few columns still fill the device."""
    tiles = -(-out_features // columns)
    blocks = -(-in_features // 128)
    split = 1
    while split < 8 and tiles * split < fill and split * 2 <= blocks:
        split *= 2
    return split
