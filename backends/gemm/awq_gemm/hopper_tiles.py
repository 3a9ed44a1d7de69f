"""Which way of the Hopper kernel to take: the least time by a model that was fitted to measurements on an H100.

``benchmarks/results/hopper-tiles-h100.json`` holds the times of every way by shape and rows that the numbers come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MULTIPROCESSORS = 132
SPLITS = (1, 2, 3, 4, 6, 8)
START = 3.0


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


@dataclass(frozen=True, slots=True)
class Work:
    """How a problem is done: by ``programs`` that share out ``shared`` tiles evenly and take the others whole."""

    way: Way
    programs: int
    shared: int


def time_of(work: Work, tiles: int, blocks: int, multiprocessors: int) -> float:
    """Microseconds, roughly."""
    way = work.way
    each = way.alone if work.programs <= multiprocessors else way.shared
    time = START + -(-(tiles - work.shared) // work.programs) * blocks * each
    if work.shared:
        share = work.shared * blocks / work.programs
        parts = math.ceil(blocks / share) if share < blocks else 1
        time += share * each + (1 + parts) * way.joining
    return time


def works(way: Way, rows: int, in_features: int, out_features: int, multiprocessors: int) -> list[Work]:
    """What there is to choose from."""
    blocks = -(-in_features // 128)
    tiles = -(-out_features // way.n) * -(-rows // way.m)
    slots = multiprocessors * way.programs
    found = [Work(way, min(tiles, slots), 0)]
    whole, left = divmod(tiles, slots)
    if whole and left:
        found += [Work(way, slots, left), Work(way, slots, slots + left)]
    elif left:
        for programs in {*(tiles * split for split in SPLITS), slots, multiprocessors}:
            if tiles < programs <= slots and tiles * blocks >= 2 * programs:
                found.append(Work(way, programs, tiles))
    return [work for work in found if not work.shared or work.shared * blocks >= 2 * work.programs]


def plain_time(rows: int, in_features: int, out_features: int) -> float:
    """The same of ``kernels.matmul``, whose small tiles are better where there is little to do."""
    speed = 300e6 if in_features >= 8192 else 450e6  # operations a microsecond
    return 2.0 * rows * in_features * out_features / speed + 6.5


def work_for(rows: int, in_features: int, out_features: int, multiprocessors: int = MULTIPROCESSORS) -> Work | None:
    """The fastest; None: ``kernels.matmul`` is faster."""
    blocks = -(-in_features // 128)
    best, chosen = plain_time(rows, in_features, out_features), None
    for way in WAYS:
        tiles = -(-out_features // way.n) * -(-rows // way.m)
        for work in works(way, rows, in_features, out_features, multiprocessors):
            time = time_of(work, tiles, blocks, multiprocessors)
            if time < best:
                best, chosen = time, work
    return chosen
