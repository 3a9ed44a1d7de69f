"""Tile sizes by shape, as measured on an H100 and an H200 (README.md); a guess elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

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


# Of the kernel for one row.
BLOCKS = 4  # of 128 k that a warp takes in a step
SMALL = 20 << 20  # codes up to which one program a multiprocessor, with more of its words on their way, is faster
MOST_NORMED = 8192  # in_features up to which a thread's share of a row stays in registers until its norm is known
MOST_IN = 32768  # in_features whose row fits into shared memory beside the words


@dataclass(frozen=True, slots=True)
class Way:
    """``programs`` on a multiprocessor, each with ``depth`` steps of words in shared memory."""

    programs: int
    depth: int


def steps_for(in_features: int) -> int:
    """In how many steps the warps of a program take K."""
    return -(-in_features // (128 * WARPS * BLOCKS))


def way_for(in_features: int, out_features: int) -> Way:
    """How the kernel for one row runs."""
    if in_features * out_features <= SMALL:
        return Way(1, 6)
    return Way(2, 4) if in_features <= 20480 else Way(1, 4)


def programs_for(way: Way, width: int, multiprocessors: int) -> int:
    """How many programs take the column tiles of y in equal numbers, as far as that goes."""
    tiles = -(-width // 16)
    each = -(-tiles // (multiprocessors * way.programs))
    return -(-tiles // each)
