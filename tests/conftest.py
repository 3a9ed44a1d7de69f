"""What several test files share: tiny checkpoints, the dense oracle, and a backend that repacks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the network
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in awq_core.testing.checks, where MKL has not run yet

from collections.abc import Callable

import pytest
import torch

from awq_core import plugins
from awq_core.capability import Capability
from awq_core.kernel import Backend, Kernel, ResidentLayout
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.layouts.base import Codes
from awq_core.notice import tell
from awq_core.spec import Rows

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Whoever runs the tests may have asked for a backend in the environment."""
    for name in [name for name in os.environ if name.startswith("AWQ_CORE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def told(caplog):
    """The sentences that the user was told in this test, as a function."""
    tell.cache_clear()
    logger = logging.getLogger("awq_core")
    logger.propagate, before = True, logger.propagate
    with caplog.at_level(logging.WARNING, logger="awq_core"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "awq_core"]
    logger.propagate = before


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint("llama", layout="gemv", ...)``: the folder of a tiny AWQ checkpoint, made once; don't change it.

    The dense model lies beside it in ``dense``.
    """
    from awq_core.testing.tiny import tiny_checkpoint

    made: dict[tuple, Path] = {}

    def make(architecture: str = "llama", **options) -> Path:
        key = (architecture, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(architecture), architecture, **options)
        return made[key]

    return make


# A backend that keeps weights in a layout of its own, whatever else is installed: codes a byte each, scales in float32.

_SCALES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _prepare(spec, tensors):
    def one(parts):
        codes = checkpoint_layout(spec.layout).unpack(parts, spec.in_features, spec.out_features, spec.group_size)
        out = {"codes": codes.codes, "zeros": codes.zeros, "steps": codes.scales.float()}
        return out | {"kind": torch.tensor(list(_SCALES.values()).index(codes.scales.dtype), dtype=torch.uint8)}

    if not spec.experts:
        return one(tensors)
    parts = [one({name: tensor[e] for name, tensor in tensors.items()}) for e in range(spec.experts)]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _restore(spec, tensors):
    def one(parts):
        dtype = list(_SCALES.values())[int(parts["kind"])]
        return checkpoint_layout(spec.layout).pack(Codes(parts["codes"], parts["zeros"], parts["steps"].to(dtype)))

    if not spec.experts:
        return one(tensors)
    parts = [one({name: tensor[e] for name, tensor in tensors.items()}) for e in range(spec.experts)]
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def _dense(spec, tensors, dtype):
    return dequantize(Codes(tensors["codes"], tensors["zeros"], tensors["steps"]), dtype)


def _nbytes(spec):
    one = spec.in_features * spec.out_features + 5 * (spec.in_features // spec.group_size) * spec.out_features + 1
    return one * max(1, spec.experts)


TOY = Backend(
    name="toy",
    kernels=(
        Kernel(
            name="bytes",
            reads="toy_bytes",
            capabilities=(
                Capability(
                    device="cpu",
                    layouts=frozenset({"gemm", "gemv"}),
                    dtypes=frozenset(_SCALES),
                    priority=990,
                    rows=Rows(1, 4),
                ),
            ),
            apply=lambda weight, x, bias: x @ weight.dequantize(x.dtype),  # not picklable, as a plugin's may be
        ),
    ),
    layouts=(ResidentLayout("toy_bytes", _prepare, _restore, _dense, _nbytes),),
)


@pytest.fixture
def toy(monkeypatch):
    """The backend ``toy`` outranks the others on the CPU for up to 4 rows, and repacks gemm and gemv weights."""
    found = plugins.load([])
    with_toy = replace(
        found,
        backends=MappingProxyType({**found.backends, "toy": TOY}),
        layouts=MappingProxyType({**found.layouts, "toy_bytes": TOY.layouts[0]}),
    )
    monkeypatch.setattr(plugins, "registry", lambda: with_toy)
    return TOY


@pytest.fixture(params=["installed", "toy"])
def backend(request):
    """Run a test with the backends that are installed, and again with one that repacks every weight."""
    return request.getfixturevalue("toy") if request.param == "toy" else None


@pytest.fixture
def in_process() -> Callable[..., str]:
    """Runs code in a process of its own, in Triton's interpreter or not, and gives what it printed."""

    def run(code: str, *arguments: str, interpret: bool) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *arguments],
            env=environment | ({"TRITON_INTERPRET": "1"} if interpret else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
