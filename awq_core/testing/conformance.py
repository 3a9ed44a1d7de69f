"""The conformance kit: a backend's author writes three lines, and every declaration is executed.

::

    from awq_core.testing import BackendConformance

    class TestAcme(BackendConformance):
        backend = "acme"

The cases are drawn from the backend's own Capability records, so a declaration that nothing computes right cannot stay.
GPU records run on the GPU where there is one; else, with ``TRITON_INTERPRET=1`` set before Python starts, in Triton's
interpreter on the CPU; else those cases are skipped and said so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

import pytest
import torch

from ..kernel import Backend
from ..plugins import registry
from ..spec import Device
from . import checks
from .cases import Case, declared

if TYPE_CHECKING:
    from _pytest.python import Metafunc


class BackendConformance:
    """Subclass with ``backend`` set to the name of an installed backend (or to a Backend record)."""

    backend: ClassVar[str | Backend]

    def pytest_generate_tests(self, metafunc: Metafunc) -> None:
        """Pytest asks this for the cases of each test below."""
        every = _cases(self.backend)
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", every, ids=str)
        elif "typical" in metafunc.fixturenames:
            metafunc.parametrize("typical", _typical(every), ids=str)
        elif "plain" in metafunc.fixturenames:
            metafunc.parametrize("plain", _one_per_dtype(every), ids=str)

    def test_declares_something(self) -> None:
        """A backend without a single declared cell would pass everything else."""
        assert _cases(self.backend), f"backend {self.backend} declares no cell that a checkpoint layout can hold"

    def test_numerics(self, case: Case) -> None:
        """Every declared cell: right, and completely written."""
        _run(checks.check_numerics, case)

    def test_accumulates_in_float32(self, typical: Case) -> None:
        """Sums beyond float16's range."""
        _run(checks.check_accumulation, typical)

    def test_leaves_its_inputs_alone(self, typical: Case) -> None:
        """Checkpoint tensors, resident tensors, x."""
        _run(checks.check_inputs_untouched, typical)

    def test_reads_only_its_inputs(self, typical: Case) -> None:
        """Garbage beside every tensor."""
        _run(checks.check_guards, typical)

    def test_is_repeatable(self, typical: Case) -> None:
        """Bit for bit, in two threads as well."""
        _run(checks.check_repeatable, typical)

    def test_restores_the_checkpoint(self, typical: Case) -> None:
        """Bit for bit, for saving."""
        _run(checks.check_restore, typical)

    def test_refuses_what_it_does_not_declare(self, typical: Case) -> None:
        """With reasons."""
        checks.check_refusals(typical)

    def test_as_a_module(self, plain: Case) -> None:
        """Shapes, bias, gradient, opcheck."""
        _run(checks.check_module, plain)

    def test_compiles_for_every_declared_architecture(self) -> None:
        """Triton code for GPUs that are not here, and their shared memory."""
        from . import compile as gpu_compile  # here, so that it can be run as a program

        found = _backend(self.backend)
        if not gpu_compile.gpu_kernels(found):
            pytest.skip(f"backend {found.name} declares no GPU")
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        if isinstance(self.backend, str):
            failed = _compiled_apart(self.backend)
        elif os.environ.get("TRITON_INTERPRET") == "1":
            pytest.skip("TRITON_INTERPRET=1 compiles nothing: set `backend` to a name, to compile in another process")
        else:
            failed = "\n".join(
                f"{r.kernel} on {r.arch}: {r.error}" for r in gpu_compile.compile_backend(found) if r.error
            )
        assert not failed, failed


EVERY_CELL = {"numerics": checks.check_numerics}
TYPICAL_CELLS = {
    "accumulation": checks.check_accumulation,
    "inputs_untouched": checks.check_inputs_untouched,
    "guards": checks.check_guards,
    "repeatable": checks.check_repeatable,
    "restore": checks.check_restore,
    "refusals": checks.check_refusals,
}
DTYPE_CELLS = {"module": checks.check_module}


def failures(backend: str | Backend, only: str | None = None) -> Iterator[tuple[str, Case, str]]:
    """Run the checks (or ``only`` one) without pytest: (check, case, what is wrong) of each that fails."""
    every = _cases(backend)
    for wanted, cases in ((EVERY_CELL, every), (TYPICAL_CELLS, _typical(every)), (DTYPE_CELLS, _one_per_dtype(every))):
        for name, check in wanted.items():
            for case in cases if only in (None, name) else ():
                try:
                    check(case)
                except Exception as error:  # a kernel may fail in any way
                    yield name, case, f"{type(error).__name__}: {error}"


def _backend(backend: str | Backend) -> Backend:
    return registry().backend(backend) if isinstance(backend, str) else backend


@functools.cache
def _cases(backend: str | Backend) -> tuple[Case, ...]:
    return tuple(dict.fromkeys(declared(_backend(backend), _local())))


def _compiled_apart(backend: str) -> str:
    """Compile in a process without the interpreter: what went wrong, or nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "awq_core.testing.compile", backend],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def _typical(cases: tuple[Case, ...]) -> list[Case]:
    """One case for each record, dtype, layout, group size and kind of zero point, at the record's fewest rows."""
    kept: dict[object, Case] = {}
    for case in cases:
        s = case.spec
        kept.setdefault((case.kernel.name, case.record, s.dtype, s.layout, s.group_size, s.zero_point), case)
    return list(kept.values())


def _one_per_dtype(cases: tuple[Case, ...]) -> list[Case]:
    """One case for each record, dtype and layout."""
    kept: dict[object, Case] = {}
    for case in cases:
        kept.setdefault((case.kernel.name, case.record, case.spec.dtype, case.spec.layout), case)
    return list(kept.values())


def _local() -> Device:
    return Device.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _run(check: Callable[[Case], None], case: Case) -> None:
    """Run a check where the case's device is at hand."""
    device = case.spec.device
    at_hand = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    if not at_hand and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(f"no {device} here; set TRITON_INTERPRET=1 to run Triton kernels on the CPU")
    check(case)
