"""Tables of tiles for CDNA (wave64, MFMA) and RDNA (wave32, WMMA). Nobody has measured them: they follow from sizes of
registers and LDS and from what compiles without spilling; ``awq tune`` replaces them by measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

from awq_core.api import LinearSpec

LONGEST_SPLIT = 8
CDNA = frozenset({"gfx90a", "gfx942", "gfx950"})
DIES = {"gfx942": 8, "gfx950": 8}  # XCDs of an MI300X or MI350X, each with an L2 of its own


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` of x by ``columns`` of the weight, ``words`` of each column in one step, in ``split`` parts of K.

    ``waves`` is the occupancy that the compiler keeps registers free for (``waves_per_eu``; 0: it decides), ``instr``
    the size of the matrix instruction on CDNA (``matrix_instr_nonkdim``; 0 where there is no choice).
    """

    rows: int
    columns: int
    words: int
    warps: int
    stages: int
    waves: int
    instr: int
    split: int


# (M up to, rows, columns, warps, stages, waves, instr, programs that splitting K aims at)
Row = tuple[int, int, int, int, int, int, int, int]
CDNA_TILES: tuple[Row, ...] = (
    (1, 1, 128, 4, 1, 2, 0, 608),  # an MI300X has 304 compute units
    (16, 16, 64, 4, 2, 2, 16, 608),
    (32, 32, 64, 4, 2, 2, 16, 456),
    (64, 64, 64, 4, 2, 2, 16, 304),
    (256, 64, 128, 8, 2, 2, 16, 304),
)
RDNA_TILES: tuple[Row, ...] = (
    (1, 1, 64, 4, 1, 0, 0, 384),  # an RX 7900 XTX has 96 compute units
    (16, 16, 64, 4, 2, 0, 0, 192),
    (32, 32, 64, 8, 2, 0, 0, 192),
    (256, 64, 64, 8, 2, 0, 0, 96),
)
WORDS = 16
MOST_TILED = 256  # rows up to which unpacking in the tiles should beat a dense weight made for the call


def is_cdna(arch: str) -> bool:
    """Whether the architecture has waves of 64 lanes and MFMA."""
    return arch in CDNA


def default(spec: LinearSpec, rows: int) -> Tile:
    """The tile for M rows where nothing was measured."""
    table = CDNA_TILES if is_cdna(spec.device.arch) else RDNA_TILES
    _, m, columns, warps, stages, waves, instr, fill = next(row for row in table if rows <= row[0])
    split = split_for(spec, rows, m, columns, WORDS, fill)
    return Tile(m, columns, WORDS, warps, stages, waves, instr, split)


def split_for(spec: LinearSpec, rows: int, tile_rows: int, columns: int, words: int, fill: int) -> int:
    """Into how many parts (a power of 2) K is split, so that about ``fill`` programs run."""
    programs = -(-spec.out_features // columns) * -(-rows // tile_rows)
    steps, split = -(-spec.in_features // (8 * words)), 1
    while split < LONGEST_SPLIT and programs * split < fill and split * 2 <= steps:
        split *= 2
    return split


def candidates(spec: LinearSpec, rows: int) -> list[dict[str, int]]:
    """What ``awq tune`` tries beside the default, as the fields of a Tile."""
    cdna = is_cdna(spec.device.arch)
    found: dict[Tile, None] = {}
    m = 1 if rows == 1 else next(size for size in (16, 32, 64) if rows <= size or size == 64)
    for columns, words, warps in ((32, 16, 4), (64, 16, 4), (64, 16, 8), (128, 16, 4), (128, 16, 8), (64, 32, 8)):
        for fill in (1, 304, 1216):
            split = split_for(spec, rows, m, columns, words, fill)
            for waves in (0, 2) if cdna else (0,):
                for instr in (16, 32) if cdna and m >= 32 else (16,) if cdna and m > 1 else (0,):
                    found[Tile(m, columns, words, warps, 1 if m == 1 else 2, waves, instr, split)] = None
    return [{name: getattr(tile, name) for name in Tile.__slots__} for tile in found]
