"""Compile a backend's Triton functions for every GPU that its records name; no GPU is needed.

``python -m awq_core.testing.compile BACKEND`` prints a table and leaves with 1 where a kernel does not compile for an
architecture that it declares, needs more shared memory than that architecture has, or spills more registers of a thread
to memory than ``SPILLED``. BACKEND is the name of an
installed backend, or ``module:attribute`` of a Backend record. TRITON_INTERPRET must not be 1: the kit runs this in a
process of its own, so that its other tests may run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import AwqError
from ..guard import one_line
from ..kernel import Backend, Kernel, TritonSource, no_sources
from ..plugins import registry
from ..spec import Device
from .cases import architectures, cells

KIB = 1024
# The most shared memory (LDS) that one block can have, by architecture; what is not listed is an AMD GPU with 64 KiB.
SHARED = {"sm75": 64, "sm80": 163, "sm86": 99, "sm87": 163, "sm89": 99, "sm90": 227, "sm100": 227, "sm103": 227}
SHARED |= {"sm120": 99, "sm121": 99, "gfx950": 160}
SPILLED = 40  # registers of 32 bits that a thread may keep in memory: ptxas gives up some by itself, to fit more warps


@dataclass(frozen=True)
class Compiled:
    """One Triton function on one architecture. ``shared`` in bytes; ``registers`` of a thread and how many
    more were ``spilled`` to memory, None where unknown.

    ``error`` is one sentence, empty where it compiled and fits. ``problem`` names the function's constants.
    """

    kernel: str
    arch: str
    function: str
    problem: str = ""
    registers: int | None = None
    shared: int | None = None
    spilled: int | None = None
    error: str = ""


def gpu_kernels(backend: Backend) -> list[Kernel]:
    """The kernels with a record for GPUs of NVIDIA or AMD (a record for any device is plain torch)."""
    return [kernel for kernel in backend.kernels if any(record.device == "cuda" for record in kernel.capabilities)]


def shared_limit(arch: str) -> int:
    """The most shared memory of one block, in bytes."""
    return SHARED.get(arch, 64 if arch.startswith("gfx") else 99) * KIB


def compile_backend(backend: Backend) -> Iterator[Compiled]:
    """Compile each distinct source of each GPU kernel for each architecture; failures are results too."""
    for kernel in gpu_kernels(backend):
        name = f"{backend.name}.{kernel.name}"
        if kernel.sources is no_sources:
            yield Compiled(name, "", "", error=NOTHING_SAID)
            continue
        seen: set[str] = set()
        for device, record in [(d, r) for r in kernel.capabilities for d in architectures(r)]:
            for spec in cells(record, device):
                try:
                    sources = kernel.sources(replace(spec, device=device))
                except Exception as error:
                    yield Compiled(name, device.arch, "", error=f"sources({spec}) raised {one_line(error)}")
                    break
                for source in sources:
                    key = _key(device, source)
                    if key not in seen:
                        seen.add(key)
                        yield compile_one(name, device, source)


NOTHING_SAID = (
    "declares GPUs but no sources, so nothing shows that it compiles for them: give the Kernel "
    "sources=function(spec) that lists a TritonSource for each Triton function that it launches "
    "(sources=lambda spec: () for a kernel without Triton code)"
)


def _key(device: Device, source: TritonSource) -> str:
    parts = (sorted(part.items()) for part in (source.signature, source.constants, source.options))
    return repr((device.arch, id(source.function), *parts))


def compile_one(kernel: str, device: Device, source: TritonSource) -> Compiled:
    """Compile one source for one GPU and hold it against that GPU's shared memory."""
    function = getattr(source.function, "__name__", repr(source.function))
    problem = " ".join(f"{name}={value}" for name, value in source.constants.items())
    types = {kind.removesuffix(":16").lstrip("*") for kind in source.signature.values()} - {"i32", "i64", "constexpr"}
    made = Compiled(kernel, device.arch, function, " ".join([*sorted(types), problem]))
    try:
        binary = triton_compile(device, source)
        shared = int(binary.metadata.shared)
        limit = shared_limit(device.arch)
        registers, spilled = _registers(binary)
        error = "" if shared <= limit else f"wants {shared} bytes of shared memory, {device.arch} has {limit}"
        if not error and (spilled or 0) > SPILLED:
            error = f"spills {spilled} registers of a thread, {SPILLED} are allowed"
        return replace(made, registers=registers, shared=shared, spilled=spilled, error=error)
    except Exception as error:  # Triton and the assemblers below it fail in many ways
        return replace(made, error=f"does not compile: {one_line(error)}")


def triton_compile(device: Device, source: TritonSource) -> Any:
    """Triton's CompiledKernel of one source. ValueError where the source does not say each argument once."""
    import triton
    from triton.backends.compiler import GPUTarget

    if not isinstance(source.function, triton.JITFunction):
        raise ValueError(f"TritonSource.function is a {type(source.function).__name__}, not what @triton.jit returns")
    names: list[str] = source.function.arg_names
    for part in (source.signature, source.constants):
        if unknown := sorted(set(part) - set(names)):
            raise ValueError(f"the TritonSource names {', '.join(unknown)}, which the function does not take")
    kinds = {name: "constexpr" if name in source.constants else source.signature.get(name, "") for name in names}
    if missing := [name for name, kind in kinds.items() if not kind]:
        raise ValueError(f"the TritonSource gives neither a type nor a constant for {', '.join(missing)}")
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in kinds.items() if kind.endswith(":16")}
    signature = {name: kind.removesuffix(":16") for name, kind in kinds.items()}
    if device.vendor == "amd":  # wave64 up to gfx9 (GCN, CDNA), wave32 from gfx10 (RDNA)
        target = GPUTarget("hip", device.arch, 64 if device.arch.startswith("gfx9") else 32)
    else:
        target = GPUTarget("cuda", int(device.arch.removeprefix("sm")), 32)
    if source.function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source

        # unlike Triton's own, this one wants constants by position
        constants: dict[Any, object] = {(names.index(name),): value for name, value in source.constants.items()}
    else:
        from triton.compiler import ASTSource as Source

        constants = dict(source.constants)
    made = Source(source.function, signature, constants, divisible)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Triton's are about its own settings, and a test run may make them errors
        return triton.compile(made, target=target, options=dict(source.options))


def _registers(binary: Any) -> tuple[int | None, int | None]:
    """Registers of a thread, and spilled ones: AMD's assembler writes both down, NVIDIA's are read with cuobjdump.

    NVIDIA's compiler spills to the stack, which Triton's functions use for nothing else.
    """
    if "amdgcn" in binary.asm:
        told = str(binary.asm["amdgcn"])
        return _number(r"\.vgpr_count:\s*(\d+)", told), _number(r"\.vgpr_spill_count:\s*(\d+)", told)
    if "cubin" in binary.asm and (tool := _cuobjdump()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(binary.asm["cubin"])
            done = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=False)
        stack = _number(r"STACK:(\d+)", done.stdout)
        return _number(r"REG:(\d+)", done.stdout), None if stack is None else -(-stack // 4)
    return None, None


def _number(pattern: str, told: str) -> int | None:
    found = re.search(pattern, told)
    return int(found[1]) if found else None


@functools.cache
def _cuobjdump() -> str | None:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.is_file() else None


def find(name: str) -> Backend:
    """The installed backend of that name, or the record at ``module:attribute``."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return registry().backend(name)
    found = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(found, Backend):
        raise AwqError(f"{name} is no awq_core.api.Backend")
    return found


def text(results: list[Compiled]) -> str:
    """One line a result, in columns."""
    rows: list[tuple[str, ...]] = [("kernel", "arch", "function", "problem", "registers", "spilled", "shared", "")]
    for r in results:
        numbers = ("?" if n is None else str(n) for n in (r.registers, r.spilled, r.shared))
        rows.append((r.kernel, r.arch, r.function, r.problem, *numbers, r.error))
    widths = [max(len(row[column]) for row in rows) for column in range(7)] + [0]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m awq_core.testing.compile", description=__doc__)
    parser.add_argument("backend", metavar="BACKEND")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and Triton's interpreter compiles nothing: unset it")
    try:
        results = list(compile_backend(find(options.backend)))
    except AwqError as error:
        parser.error(str(error))
    print(json.dumps([asdict(r) for r in results], indent=2) if options.json else text(results))
    return 1 if any(r.error for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
