"""The kit's compile check: real Triton functions for GPUs that are not here, and planted faults in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from awq_core.api import Backend, Capability, Kernel, Rows, TritonSource
from awq_core.spec import Device
from awq_core.testing import conformance
from awq_core.testing.cases import architectures
from awq_core.testing.compile import SPILLED, compile_backend, main, shared_limit

pytest.importorskip("triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@triton.jit
def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def product(x_ptr, w_ptr, y_ptr, BLOCK: tl.constexpr):  # noqa: N803
    rows = tl.arange(0, BLOCK)
    at = rows[:, None] * BLOCK + rows[None, :]
    y = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(16):
        y = tl.dot(tl.load(x_ptr + at), tl.load(w_ptr + at), y)
        x_ptr += BLOCK
        w_ptr += BLOCK
    tl.store(y_ptr + at, y)


@triton.jit
def adds_shapes_that_do_not_fit(x_ptr, BLOCK: tl.constexpr):  # noqa: N803
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 32)) + tl.arange(0, BLOCK))


RECORD = Capability(
    "cuda", frozenset({"gemm"}), frozenset({"float16"}), 200, rows=Rows(1, 1), group_sizes=frozenset({64})
)
POINTERS = {"x_ptr": "*fp16:16", "y_ptr": "*fp16:16"}
DOUBLE = TritonSource(double, {**POINTERS, "n": "i32"}, {"BLOCK": 128}, {"num_warps": 2})
PRODUCT = TritonSource(product, POINTERS | {"w_ptr": "*fp16:16"}, {"BLOCK": 128}, {"num_stages": 3, "num_warps": 8})
WRONG = TritonSource(adds_shapes_that_do_not_fit, {"x_ptr": "*fp16"}, {"BLOCK": 64})


def backend(*sources: TritonSource, archs: tuple[str, ...] = ("sm80",), **fields) -> Backend:
    record = replace(RECORD, archs=frozenset(archs))
    fields = {"sources": lambda spec: sources} | fields
    return Backend("made", (Kernel("k", "gemm", (record,), lambda weight, x, bias: x, **fields),))


def test_compiles_for_every_generation():
    archs = ("sm75", "sm80", "sm90", "sm100", "sm120", "gfx90a", "gfx942", "gfx1100", "gfx1201")
    results = list(compile_backend(backend(DOUBLE, archs=archs)))
    assert sorted(r.arch for r in results) == sorted(archs)
    assert [r for r in results if r.error or r.shared != 0 or not r.registers] == []
    assert {(r.kernel, r.function, r.problem) for r in results} == {("made.k", "double", "fp16 BLOCK=128")}


def test_equal_sources_are_compiled_once():
    assert len(list(compile_backend(backend(DOUBLE, DOUBLE, replace(DOUBLE, options={"num_warps": 4}))))) == 2


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (backend(WRONG), "does not compile: CompilationError: "),
        (backend(WRONG, archs=("gfx942",)), "does not compile: CompilationError: "),
        (backend(replace(DOUBLE, constants={})), "does not compile: ValueError: the TritonSource gives neither a type"),
        (backend(replace(DOUBLE, signature={"z": "i32"})), "does not compile: ValueError: the TritonSource names z, "),
        (backend(replace(DOUBLE, function=len)), "does not compile: ValueError: TritonSource.function is a builtin_"),
        (backend(PRODUCT, archs=("sm86",)), "wants "),
        (backend(sources=lambda spec: 1 / 0), "sources(K=192 N=8 g=64 gemm float16 on cuda:sm80) raised ZeroDiv"),
        (Backend("made", (Kernel("k", "gemm", (RECORD,), len),)), "declares GPUs but no sources, "),
    ],
)
def test_finds_the_planted_fault(made: Backend, error: str):
    (result,) = compile_backend(made)
    assert result.error.startswith(error)

    class Kit(conformance.BackendConformance):
        backend = made

    with pytest.raises(AssertionError) as caught:
        Kit().test_compiles_for_every_declared_architecture()
    assert result.error in str(caught.value)


def test_shared_memory_is_held_against_each_architecture():
    fits = {r.arch: not r.error for r in compile_backend(backend(PRODUCT, archs=("sm80", "sm86", "sm90")))}
    assert fits == {"sm80": True, "sm86": False, "sm90": True}


def test_spilled_registers_are_held_against_a_bound():
    wide = replace(PRODUCT, options={"num_stages": 1, "num_warps": 1})  # 512 sums in a thread
    found = list(compile_backend(backend(wide, archs=("sm80", "gfx1100"))))
    assert [(r.arch, r.error.split()[0], r.spilled > SPILLED) for r in found] == [
        ("gfx1100", "spills", True),
        ("sm80", "spills", True),
    ]


def test_a_kernel_without_triton_code_may_say_so():
    assert list(compile_backend(backend())) == []


@pytest.mark.parametrize(
    ("fields", "archs"),
    [
        ({}, ["sm80", "sm90", "gfx942", "gfx1100"]),
        ({"vendors": frozenset({"nvidia"})}, ["sm80", "sm90"]),
        ({"vendors": frozenset({"amd"})}, ["gfx942", "gfx1100"]),
        ({"archs": frozenset({"sm75", "gfx90a"})}, ["gfx90a", "sm75"]),
        ({"archs": frozenset({"sm75", "gfx90a"}), "vendors": frozenset({"nvidia"})}, ["sm75"]),
        ({"device": "*"}, []),
        ({"device": "mps"}, []),
    ],
)
def test_architectures_of_a_record(fields, archs):
    found = architectures(replace(RECORD, **fields))
    assert [device.arch for device in found] == archs
    assert all(device == Device.parse(str(device)) for device in found)


def test_limits():
    assert [shared_limit(arch) // 1024 for arch in ("sm75", "sm80", "sm89", "sm90", "gfx942", "gfx950", "gfx1201")] == [
        *(64, 163, 99, 227),
        *(64, 160, 64),
    ]


def test_backends_without_a_gpu_are_skipped():
    class Kit(conformance.BackendConformance):
        backend = "reference"

    with pytest.raises(pytest.skip.Exception, match="declares no GPU"):
        Kit().test_compiles_for_every_declared_architecture()


def test_the_command(tmp_path):
    source = (
        "from awq_core.api import *\nrecord = Capability('cuda', frozenset({'gemm'}), frozenset({'float16'}), 200)\n"
    )
    source += "SILENT = Backend('silent', (Kernel('k', 'gemm', (record,), len),))\n"
    (tmp_path / "made_up.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "awq_core.testing.compile", "made_up:SILENT", "--json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert [(r["kernel"], r["error"][:12]) for r in json.loads(done.stdout)] == [("silent.k", "declares GPU")]


def test_the_command_says_what_is_wrong(capsys, monkeypatch):
    assert main(["reference"]) == 0
    assert capsys.readouterr().out.split() == [
        *("kernel", "arch", "function", "problem", "registers", "spilled", "shared")
    ]
    with pytest.raises(SystemExit):
        main(["nobody"])
    assert "backend 'nobody' is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["json:dumps"])
    assert "json:dumps is no awq_core.api.Backend" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        main(["reference"])
    assert "unset it" in capsys.readouterr().err
