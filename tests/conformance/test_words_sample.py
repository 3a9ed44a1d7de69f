"""Without a GPU: the backends on ``awq_words``, exllama and rocm, in Triton's interpreter and through the compilers.

A sample for each family of GPUs, since each has tiles of its own; `python -m awq_core.testing.compile exllama` and
tests/gpu run the whole. The interpreter must be chosen before Triton is imported, hence the processes.
"""

import pytest

SAMPLE = """
import sys
from dataclasses import replace
from awq_core.capability import check
from awq_core.spec import Device
from awq_core.testing import checks, conformance

name, device = sys.argv[1], Device.parse(sys.argv[2])
kept = {}
for case in conformance._cases(name):
    s = case.spec
    wanted = (s.layout, s.group_size) in (("gemm", 48), ("gemm", 64), ("gemm", 128), ("gemv_fast", 64))
    wanted = wanted and (s.dtype == "float16" or (s.layout, s.group_size) == ("gemm", 64))
    if wanted and case.rows in (1, 2, 9, 18, 33, 51, 257) and s.in_features < 600:
        case = replace(case, spec=replace(s, device=device))
        if not check(case.capability, case.spec, case.rows):
            kept.setdefault((case.kernel.name, s.dtype, s.layout, s.group_size, s.out_features, case.rows), case)
kernels = {case.kernel.name for case in kept.values()}
assert kernels == {"rows", "tiles", "dequantize"}, kernels
for (_, dtype, layout, group, n, rows), case in kept.items():
    checks.check_numerics(case)
    if (layout, group, dtype) == ("gemm", 64, "float16") and n == 8 and rows in (1, 2, 9, 51):
        for run in (checks.check_accumulation, checks.check_inputs_untouched, checks.check_guards):
            run(case)
        for run in (checks.check_repeatable, checks.check_restore, checks.check_refusals):
            run(case)
print(len(kept), "cells")
"""

COMPILE = """
import sys
from awq_core.plugins import registry
from awq_core.spec import Device, LinearSpec
from awq_core.testing.cases import architectures
from awq_core.testing.compile import compile_one, shared_limit, triton_compile

name = sys.argv[1]
count = 0
for kernel in registry().backend(name).kernels:
    for record in kernel.capabilities:
        for device in architectures(record):
            spec = LinearSpec(4096, 4096, 128, dtype=min(record.dtypes), device=device)
            for source in kernel.sources(spec):
                done = compile_one(kernel.name, device, source)
                assert not done.error, (kernel.name, device.arch, done.problem, done.error)
                assert done.shared <= 64 * 1024 or device.vendor == "nvidia", (device.arch, done.shared)
                count += 1
                if kernel.name == "tiles" and "MT" in source.constants:
                    code = triton_compile(device, source).asm
                    made = str(code["amdgcn" if device.vendor == "amd" else "ptx"])
                    want = ("v_mfma", "v_wmma") if device.vendor == "amd" else ("mma.sync", "wgmma", "tcgen05.mma")
                    assert any(instruction in made for instruction in want), f"no tensor core on {device.arch}"
print(count, "compiled")
"""


@pytest.mark.parametrize(
    ("backend", "device"),
    [("exllama", "cuda:sm90"), ("exllama", "cuda:sm75"), ("rocm", "hip:gfx942"), ("rocm", "hip:gfx1100")],
)
def test_a_sample_is_right_in_the_interpreter(in_process, backend: str, device: str):
    pytest.importorskip("triton")
    if device == "cuda:sm75":
        code = SAMPLE.replace('{"rows", "tiles", "dequantize"}', '{"rows", "dequantize"}')
    else:
        code = SAMPLE
    assert "cells" in in_process(code, backend, device, interpret=True)


@pytest.mark.parametrize("backend", ["exllama", "rocm"])
def test_the_kernels_compile(in_process, backend: str):
    pytest.importorskip("triton")
    assert "compiled" in in_process(COMPILE, backend, interpret=False)
