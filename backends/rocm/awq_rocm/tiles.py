"""Tables of tiles for CDNA (wave64, MFMA) and RDNA (wave32, WMMA). Nobody has measured them: they follow from sizes of
registers and LDS and from what compiles without spilling; ``awq tune`` replaces them by measuring.
"""

from __future__ import annotations

from dataclasses import dataclass

from awq_core.api import LinearSpec
from awq_core.words.tiles import Tile, configs, split_for

CDNA = frozenset({"gfx90a", "gfx942", "gfx950"})
DIES = {"gfx942": 8, "gfx950": 8}  # XCDs of an MI300X or MI350X, each with an L2 of its own


@dataclass(frozen=True, slots=True)
class AmdTile(Tile):
    """A tile of ``rows`` of x.

    ``waves`` is the occupancy that the compiler keeps registers free for (``waves_per_eu``; 0: it decides), ``instr``
    the size of the matrix instruction on CDNA (``matrix_instr_nonkdim``; 0 where there is no choice).
    """

    rows: int
    waves: int
    instr: int

    def options(self) -> dict[str, int]:
        """What Triton's AMD compiler is told of it."""
        return {"num_warps": self.warps, "waves_per_eu": self.waves, "matrix_instr_nonkdim": self.instr}


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


def dies(spec: LinearSpec) -> int:
    """Dies that programs are dealt out to in turn."""
    return DIES.get(spec.device.arch, 1)


def default(spec: LinearSpec, rows: int) -> AmdTile:
    """The tile for M rows where nothing was measured."""
    table = CDNA_TILES if is_cdna(spec.device.arch) else RDNA_TILES
    _, m, columns, warps, stages, waves, instr, fill = next(row for row in table if rows <= row[0])
    split = split_for(spec, tiles_of(spec, rows, m, columns), WORDS, fill)
    return AmdTile(columns, WORDS, warps, stages, split, m, waves, instr)


def tiles_of(spec: LinearSpec, rows: int, tile_rows: int, columns: int) -> int:
    """Into how many tiles y falls."""
    return -(-spec.out_features // columns) * -(-rows // tile_rows)


def candidates(spec: LinearSpec, rows: int) -> list[dict[str, int]]:
    """What ``awq tune`` tries beside the default, as the fields of an AmdTile."""
    cdna = is_cdna(spec.device.arch)
    m = 1 if rows == 1 else next(size for size in (16, 32, 64) if rows <= size or size == 64)
    stages = 1 if m == 1 else 2
    instrs = (16, 32) if cdna and m >= 32 else (16,) if cdna and m > 1 else (0,)
    shapes = ((32, 16, 4), (64, 16, 4), (64, 16, 8), (128, 16, 4), (128, 16, 8), (64, 32, 8))
    return configs(
        AmdTile(columns, words, warps, stages, split, m, waves, instr)
        for columns, words, warps in shapes
        for split in [split_for(spec, tiles_of(spec, rows, m, columns), words, fill) for fill in (1, 304, 1216)]
        for waves in ((0, 2) if cdna else (0,))
        for instr in instrs
    )
