"""The choice of the Hopper kernel's work: its model of the time against the times that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_gemm.hopper_tiles import WAYS, tiles_of, time_of, work_for, works

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "hopper-tiles-h100.json"
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096), "k": (4096, 1024)}
SHAPES["small"] = (896, 896)


def measured():
    """(rows, K, N), and microseconds by tile, programs and shared tiles."""
    for name, times in json.loads(MEASURED.read_text()).items():
        shape, rows = name.split()
        yield (int(rows), *SHAPES[shape]), times


def test_what_is_chosen_is_near_the_fastest_that_was_measured():
    checked = 0
    for problem, times in measured():
        work = work_for(*problem)
        name = "tiles" if work is None else f"{work.way.n}x{work.way.m} {work.programs} {work.shared}"
        best = min(us for way, us in times.items() if way != "dense")
        assert times[name] <= 1.07 * best, (problem, name, times[name], best)
        checked += 1
    assert checked >= 30


@pytest.mark.parametrize("rows", [256, 1000, 5000])
def test_few_rows_are_left_to_the_plain_kernel_and_many_are_not(rows):
    assert work_for(80, 4096, 28672) is None  # half of a tile would be empty
    assert work_for(rows, 4096, 1 << 16) is not None


sizes = st.integers(65, 5000), st.integers(1, 200), st.integers(1, 4000), st.integers(16, 160)


@given(*sizes)
def test_every_program_has_work_and_no_share_is_a_sliver(rows, blocks, eighths, multiprocessors):
    for way in WAYS:
        for work in works(way, rows, 128 * blocks, 8 * eighths, multiprocessors):
            tiles = tiles_of(way, rows, 8 * eighths)
            assert 0 <= work.shared <= tiles
            assert 1 <= work.programs <= multiprocessors * way.programs
            assert work.shared * blocks >= 2 * work.programs or not work.shared
            assert work.shared or work.programs <= tiles


def test_more_work_takes_longer():
    for way in WAYS:
        for work in works(way, 512, 4096, 4096):
            times = [time_of(work, 512, 1024 * k, 4096) for k in (4, 8, 16)]
            assert times == sorted(times)
            assert times[0] > 0
