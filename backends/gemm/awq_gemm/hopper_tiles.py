"""How the Hopper kernel does a problem: in the least time by a model that was fitted to measurements on an H100.

``benchmarks/results/hopper-tiles-h100.json`` (made by ``benchmarks/hopper_tiles.py``) holds the times of every way by
shape and rows that the numbers come from.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

MULTIPROCESSORS = 132
SPLITS = (1, 2, 3, 4, 6, 8)
START = 1.8
UNEVEN = 1.09  # programs that begin anywhere in K don't read the same x at the same time
MOST_SHARED = 40e6  # bytes of x up to which that x stays in the L2 for them


@dataclass(frozen=True, slots=True)
class Way:
    """Tiles of ``n`` columns by ``m`` rows; ``planes`` of 16 k in a chunk, ``stages`` chunks of x in shared memory.

    ``alone`` and ``crowded`` are microseconds for a block of 128 k where one or two programs run on a multiprocessor,
    ``giving`` and ``joining`` what it costs that a tile is cut along K, and each of its parts.
    """

    n: int
    m: int
    planes: int
    stages: int
    warps: int
    programs: int  # on a multiprocessor
    alone: float
    crowded: float
    giving: float
    joining: float


WAYS = (
    Way(128, 256, 4, 5, 8, 1, 1.52, 1.52, 0.6, 2.1),
    Way(128, 128, 2, 5, 4, 2, 1.02, 1.82, 2.5, 1.0),
    Way(64, 128, 4, 4, 4, 2, 0.69, 1.06, 1.0, 0.46),
)


@dataclass(frozen=True, slots=True)
class Work:
    """How a problem is done: by ``programs`` that share out ``shared`` tiles evenly and take the others whole."""

    way: Way
    programs: int
    shared: int


def tiles_of(way: Way, rows: int, out_features: int) -> int:
    """How many tiles y has."""
    return -(-out_features // way.n) * -(-rows // way.m)


def works(
    way: Way, rows: int, in_features: int, out_features: int, multiprocessors: int = MULTIPROCESSORS
) -> list[Work]:
    """What there is to choose from."""
    blocks = -(-in_features // 128)
    tiles = tiles_of(way, rows, out_features)
    slots = multiprocessors * way.programs
    whole, left = divmod(tiles, slots)
    found = [Work(way, min(tiles, slots), 0)]
    if rows * in_features * 2 > MOST_SHARED:
        return found
    if whole and left:
        found += [Work(way, slots, left), Work(way, slots, slots + left)]
    elif left:
        for programs in {*(tiles * split for split in SPLITS), slots, multiprocessors}:
            if tiles < programs <= slots:
                found.append(Work(way, programs, tiles))
    return [work for work in found if not work.shared or work.shared * blocks >= 2 * work.programs]


def time_of(
    work: Work, rows: int, in_features: int, out_features: int, multiprocessors: int = MULTIPROCESSORS
) -> float:
    """Microseconds, roughly."""
    way, blocks = work.way, -(-in_features // 128)
    each = way.alone if work.programs <= multiprocessors else way.crowded
    whole = tiles_of(way, rows, out_features) - work.shared
    time = START + -(-whole // work.programs) * blocks * each
    if work.shared:
        share = work.shared * blocks / work.programs
        parts = math.ceil(blocks / share) if share < blocks else 1
        time += share * each * (UNEVEN if work.programs % work.shared else 1.0) + way.giving + parts * way.joining
    return time


def plain_time(rows: int, in_features: int, out_features: int) -> float:
    """The same of ``kernels.matmul``, whose small tiles are better where there is little to do."""
    return 5.5 + 0.11 * -(-in_features // 128) + 2.0 * rows * in_features * out_features / 500e6


@functools.lru_cache(maxsize=4096)
def work_for(rows: int, in_features: int, out_features: int, multiprocessors: int = MULTIPROCESSORS) -> Work | None:
    """The fastest; None: ``kernels.matmul`` is faster."""
    best, chosen = plain_time(rows, in_features, out_features), None
    for way in WAYS:
        for work in works(way, rows, in_features, out_features, multiprocessors):
            time = time_of(work, rows, in_features, out_features, multiprocessors)
            if time < best:
                best, chosen = time, work
    return chosen
