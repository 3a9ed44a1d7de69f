"""The choice of the Hopper kernel's tiles: its model of the time against the times that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from awq_gemm.hopper_tiles import MULTIPROCESSORS, SPLITS, WAYS, time_of, way_for

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "hopper-tiles-h100.json"
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}


def measured():
    """(rows, K, N) to microseconds by (columns, rows, warps, split)."""
    for name, times in json.loads(MEASURED.read_text()).items():
        shape, rows = name.split()
        found = {}
        for way, us in times.items():
            if way != "dense":
                found[tuple(map(int, re.fullmatch(r"(\d+)x(\d+)w(\d+)(?:p2)?/(\d+)", way).groups()))] = us
        yield (int(rows), *SHAPES[shape]), found


def test_what_is_chosen_is_near_the_fastest_that_was_measured():
    checked = 0
    for problem, times in measured():
        chosen = way_for(*problem)
        if chosen is None or problem[0] < 128:
            continue
        way, split = chosen
        ours = times.get((way.n, way.m, way.warps, split))
        if ours is not None:  # not every split was measured
            assert ours <= 1.15 * min(times.values()), (problem, chosen, ours, min(times.values()))
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize("rows", [256, 1000, 5000])
def test_small_problems_are_left_to_the_plain_kernel_and_large_ones_are_not(rows):
    assert way_for(65, 4096, 4096) is None
    assert way_for(rows, 4096, 1 << 16) is not None


def test_a_split_is_never_finer_than_k():
    for blocks in range(1, 40):
        for rows in (65, 128, 512):
            chosen = way_for(rows, 128 * blocks, 1024)
            assert chosen is None or chosen[1] == 1 or blocks >= 4 * chosen[1]


def test_more_work_takes_longer():
    for way in WAYS:
        for split in SPLITS:
            times = [time_of(way, split, 512, 1024 * k, 4096, MULTIPROCESSORS) for k in (4, 8, 16)]
            assert times == sorted(times)
            assert times[0] > 0
