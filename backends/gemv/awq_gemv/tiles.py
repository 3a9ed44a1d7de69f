"""Tile sizes by shape, as measured on an H100 and an H200 (README.md); a guess elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from awq_core.api import LinearSpec

MOST_ROWS = 16
WARPS, STAGES = 4, 3
REGISTERS = 128  # of a thread, so that four programs fit on a multiprocessor
AHEAD = 1  # blocks of 128 k that a program fetches before the kernel before has ended; more delay what that one reads
WIDE = 16384  # columns from which a tile is wider


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of y^T: ``rows`` of x by ``columns``; ``fill`` is the number of programs that splitting K aims at."""

    columns: int
    rows: int
    fill: int
    stages: int = STAGES
    warps: int = WARPS


def tile_for(rows: int, out_features: int) -> Tile:
    """The tile for M rows where nothing was measured."""
    if rows == 1:
        return Tile(128, 8, 256)
    if rows <= 8 and out_features >= WIDE:
        return Tile(128, 16, 256)
    return Tile(64, 16, 384)


def candidates(spec: LinearSpec, rows: int) -> list[dict[str, int]]:
    """What ``awq tune`` tries beside it, as the fields of a Tile."""
    return [
        asdict(Tile(columns, 8 if rows <= 8 else 16, fill, stages, warps))
        for columns, warps in ((64, 4), (128, 4), (128, 8))
        for fill in (1, 192, 384)
        for stages in (2, 3, 4)
    ]


def split_for(tile: Tile, in_features: int, out_features: int) -> int:
    """Into how many parts (a power of 2, at most 8) K is split, so that few columns still fill the device."""
    tiles = -(-out_features // tile.columns)
    blocks = -(-in_features // 128)
    split = 1
    while split < 8 and tiles * split < tile.fill and split * 2 <= blocks:
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
    """How the kernel for one row runs: what was best where calls follow each other, which no single call shows."""
    if in_features * out_features <= SMALL:
        return Way(1, 6)
    return Way(2, 4) if in_features <= 20480 else Way(1, 4)


def programs_for(way: Way, width: int, multiprocessors: int) -> int:
    """How many programs take the column tiles of y in equal numbers, as far as that goes."""
    tiles = -(-width // 16)
    each = -(-tiles // (multiprocessors * way.programs))
    return -(-tiles // each)
