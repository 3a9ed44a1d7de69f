"""Which way of the Hopper kernel to take: the least time by a model that was fitted to measurements on an H100.

``benchmarks/results/hopper-tiles-h100.json`` holds the times of every way by shape and rows that the numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

MULTIPROCESSORS = 132
SPLITS = (1, 2, 3, 4, 6, 8)
BANDWIDTH = 4.1e6  # bytes a microsecond at which the parts of a split are added up, after a launch
LAUNCH = 1.5


@dataclass(frozen=True, slots=True)
class Way:
    """Tiles of ``n`` columns by ``m`` rows; ``planes`` of 16 k in a chunk, ``stages`` chunks of x in shared memory.

    ``alone`` and ``shared`` are microseconds for a block of 128 k where one or two programs run on a multiprocessor,
    ``joining`` what writing the sums of one part of a split costs.
    """

    n: int
    m: int
    planes: int
    stages: int
    warps: int
    programs: int  # on a multiprocessor
    alone: float
    shared: float
    joining: float


WAYS = (
    Way(128, 256, 4, 5, 8, 1, 1.34, 1.34, 5.0),
    Way(128, 128, 2, 5, 4, 2, 0.95, 1.65, 1.8),
    Way(64, 128, 4, 4, 4, 2, 0.65, 0.95, 0.8),
)


def time_of(way: Way, split: int, rows: int, in_features: int, out_features: int, multiprocessors: int) -> float:
    """Microseconds, roughly."""
    units = -(-out_features // way.n) * -(-rows // way.m) * split
    blocks = -(-in_features // 128) / split
    here = min(way.programs, -(-units // multiprocessors))
    waves = -(-units // (multiprocessors * here))
    each = (way.alone if here == 1 else way.shared) * blocks + 2.0
    if split == 1:
        return waves * each
    adding = LAUNCH + rows * out_features * (4 * split + 2) / BANDWIDTH
    return waves * (each + way.joining) + adding


def plain_time(rows: int, in_features: int, out_features: int) -> float:
    """The same of ``kernels.matmul``, whose small tiles are better where there is little to do."""
    speed = 300e6 if in_features >= 8192 else 450e6  # operations a microsecond
    return 2.0 * rows * in_features * out_features / speed + 6.5


def way_for(
    rows: int, in_features: int, out_features: int, multiprocessors: int = MULTIPROCESSORS
) -> tuple[Way, int] | None:
    """The fastest way and into how many parts K is split; None: ``kernels.matmul`` is faster."""
    blocks = -(-in_features // 128)
    ways = [
        (time_of(way, split, rows, in_features, out_features, multiprocessors), i, split)
        for i, way in enumerate(WAYS)
        for split in SPLITS
        if split == 1 or blocks >= 4 * split
    ]
    best, i, split = min(ways)
    return None if plain_time(rows, in_features, out_features) < best else (WAYS[i], split)
