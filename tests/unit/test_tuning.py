"""What ``awq tune`` keeps, how it is looked up, and how the best config is chosen; timings are made up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from awq_core import tuning
from awq_core.api import tuned
from awq_core.cli import app
from awq_core.cli._tuning import jobs_of, search
from awq_core.kernel import nothing_to_tune
from awq_core.plugins import registry
from awq_core.request import Request
from awq_core.selection import select
from awq_core.spec import Device, LinearSpec
from awq_core.tuning import Measured, band, read, representatives, trial, write

SPEC = LinearSpec(4096, 6144, 128, device=Device.parse("cuda:sm90"))
GPU = torch.device("cuda", 0)
NAME = "Made-up GPU (80GB)"
ONE = Measured("acme.k", 4096, 6144, 128, "float16", 16, {"columns": 64}, 10.0, 12.5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.CACHE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: NAME)
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_bands():
    assert [band(m) for m in (1, 2, 3, 4, 5, 16, 17, 33, 300)] == [1, 2, 4, 4, 8, 16, 32, 64, 512]


@pytest.mark.parametrize(
    ("first", "last", "wanted"),
    [
        (1, 1, [1]),
        (2, 50, [2, 4, 8, 16, 32, 50]),
        (5, 8, [5, 8]),
        (1, None, [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        (51, None, [51, 64, 128, 256]),
        (300, None, [300]),
    ],
)
def test_representatives_reach_every_band(first, last, wanted):
    found = representatives(first, last)
    assert found == wanted
    end = tuning.MOST_WARMED if last is None else last
    assert {band(m) for m in range(first, end + 1)} <= {band(m) for m in found}


def test_what_is_written_is_looked_up():
    assert tuned("acme.k", SPEC, 16, GPU) is None
    path = write(NAME, [ONE])
    assert path.name == "made-up-gpu-80gb.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no part of a file is left
    assert tuned("acme.k", SPEC, 9, GPU) == {"columns": 64}
    for other in (replace(SPEC, group_size=64), replace(SPEC, dtype="bfloat16"), replace(SPEC, in_features=8192)):
        assert tuned("acme.k", other, 9, GPU) is None
    assert tuned("acme.k", SPEC, 17, GPU) is None
    assert tuned("acme.other", SPEC, 16, GPU) is None
    assert tuned("acme.k", SPEC, 16, torch.device("cpu")) is None


def test_a_new_measurement_replaces_the_old_one():
    write(NAME, [ONE, replace(ONE, rows=32)])
    write(NAME, [replace(ONE, config={}, us=12.5)])
    assert [(entry.rows, entry.config) for entry in read(NAME)] == [(16, {}), (32, {"columns": 64})]
    assert tuned("acme.k", SPEC, 16, GPU) is None  # the default was the fastest


def test_other_versions_are_not_used(told, monkeypatch):
    path = write(NAME, [ONE])
    path.write_text(path.read_text().replace(tuning.versions()["awq_core"], "0.0.1"))
    assert read(NAME) == []
    assert "was measured with other versions" in told()[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": 3}', "config"])
def test_a_damaged_file_is_told_of(told, text):
    path = write(NAME, [ONE])
    document = json.loads(path.read_text())
    if text == "config":
        document["entries"][0]["config"] = {"columns": "wide"}
        text = json.dumps(document)
    path.write_text(text)
    tuning._table.cache_clear()
    assert tuned("acme.k", SPEC, 16, GPU) is None
    assert "cannot be used" in told()[0]
    write(NAME, [ONE])
    assert tuned("acme.k", SPEC, 16, GPU) == {"columns": 64}


def test_a_trial_answers_inside_its_block_alone():
    write(NAME, [ONE])
    with trial("acme.k", {"columns": 8}):
        assert tuned("acme.k", SPEC, 16, GPU) == {"columns": 8}
        assert tuned("acme.other", SPEC, 16, GPU) is None
    with trial("acme.k", None):
        assert tuned("acme.k", SPEC, 16, GPU) is None
    assert tuned("acme.k", SPEC, 16, GPU) == {"columns": 64}


def job(*configs):
    kernel = next(k for k in registry().backend("exllama").kernels if k.name == "tiles")
    plan = select(SPEC, Request("exllama", "a test"), imagined=True)
    found = next(j for j in jobs_of(plan, 256) if j.rows == 16)
    assert found.kernel is kernel
    return replace(found, configs=configs)


def test_the_fastest_config_is_found_and_failing_ones_left_out():
    times = {None: 10.0, 1: 9.9, 2: 7.0, 3: 8.0}

    def time(job, config):
        if config == {"n": 4}:
            raise RuntimeError("out of resources: shared memory")
        return times[config and config["n"]]

    best = search(job(*({"n": n} for n in (1, 2, 3, 4))), time)
    assert (best.kernel, best.rows, best.config, best.us, best.default_us) == (
        *("exllama.tiles", 16, {"n": 2}),
        *(7.0, 10.0),
    )
    assert search(job({"n": 1}), time).config == {}  # no faster than noise


def test_jobs_cover_the_bands_of_a_plan():
    plan = select(SPEC, Request("exllama", "a test"), imagined=True)
    assert [(j.name, j.rows) for j in jobs_of(plan, 256)] == [
        ("exllama.rows", 1),
        *(("exllama.tiles", rows) for rows in (2, 4, 8, 16, 32, 50)),
    ]
    assert max(j.rows for j in jobs_of(plan, 8)) == 8


@pytest.mark.parametrize(
    ("backend", "device"),
    [
        ("exllama", "cuda:sm90"),
        ("rocm", "hip:gfx942"),
        ("rocm", "hip:gfx1100"),
        ("gemm", "cuda:sm86"),
        ("gemv", "cuda:sm90"),
    ],
)
def test_configs_are_plain_data_that_the_kernel_takes(backend, device):
    spec = replace(SPEC, device=Device.parse(device))
    checked = 0
    for kernel in registry().backend(backend).kernels:
        if kernel.tunables is nothing_to_tune:
            continue
        tiles = __import__(f"awq_{backend}.tiles", fromlist=["default"])
        tile = type(tiles.default(spec, 16)) if hasattr(tiles, "default") else tiles.Tile
        for rows in (1, 16, 50):
            configs = kernel.tunables(spec, rows)
            assert 1 < len(configs) == len({tuple(config.items()) for config in configs})
            assert all(json.loads(json.dumps(config)) == config for config in configs)
            assert all(tile(**config) for config in configs)
            checked += 1
    assert checked


def test_the_command_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    done = CliRunner().invoke(app, ["tune"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "error: awq tune measures on a GPU, and torch sees none in this machine\n"
