"""What the tiles of all kernels on ``awq_words`` have in common; how large they are is each backend's choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..spec import LinearSpec

LONGEST_SPLIT = 8
COMBINED = 512  # elements of y that one program of ``combine`` adds up


@dataclass(frozen=True, slots=True)
class Tile:
    """``columns`` of the weight by ``words`` of each in one step; ``split`` is the number of parts of K."""

    columns: int
    words: int
    warps: int
    stages: int
    split: int

    def options(self) -> dict[str, int]:
        """What Triton's compiler is told of it."""
        return {"num_warps": self.warps}


DENSE = Tile(128, 16, 8, 1, 1)  # of ``dequantize``


def split_for(spec: LinearSpec, tiles: int, words: int, fill: int) -> int:
    """Into how many parts (a power of 2) K is split, so that ``tiles`` of y become about ``fill`` programs."""
    steps, split = -(-spec.in_features // (8 * words)), 1
    while split < LONGEST_SPLIT and tiles * split < fill and split * 2 <= steps:
        split *= 2
    return split


def constants(spec: LinearSpec, tile: Tile) -> dict[str, int | bool]:
    """What ``rows`` and ``product`` are compiled for."""
    return {
        "NT": tile.columns,
        "R": tile.words,
        "SPLIT": tile.split,
        "UNIFORM": spec.group_size % (8 * tile.words) == 0 or spec.groups == 1,
        "EVEN": spec.in_features % (8 * tile.words) == 0 and spec.out_features % tile.columns == 0,
    }


def configs(tiles: Iterable[Tile]) -> list[dict[str, int]]:
    """Each distinct tile as ``awq tune`` keeps it: its fields by name."""
    return [asdict(tile) for tile in dict.fromkeys(tiles)]
