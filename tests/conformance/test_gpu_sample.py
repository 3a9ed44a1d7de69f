"""Without a GPU: a sample of the GPU backends' cells in Triton's interpreter, and their kernels compiled.

The whole of it runs on a GPU (tests/gpu). The interpreter must be chosen before Triton is imported, hence the process.
"""

import pytest

SAMPLE = """
import sys
from awq_core.testing import checks, conformance

name = sys.argv[1]
every = conformance._cases(name)
groups = (16, 48, 64, 128)
wanted = [c for c in every if c.rows in (1, 3, 17) and c.spec.layout == "gemm" and c.spec.group_size in groups]
kept = {}
for case in wanted:
    s = case.spec
    kept.setdefault((case.kernel.name, s.dtype, s.group_size, case.rows), case)
assert len(kept) >= 10, len(kept)
for case in kept.values():
    checks.check_numerics(case)
    if case.rows == 1 and case.spec.group_size == 64:
        checks.check_accumulation(case)
        checks.check_inputs_untouched(case)
        checks.check_guards(case)
        checks.check_restore(case)
        checks.check_refusals(case)
print(len(kept), "cells")
"""

COMPILE = """
import sys
from awq_core.plugins import registry
from awq_core.spec import Device, LinearSpec
from awq_core.testing.compile import compile_one

backend = registry().backend(sys.argv[1])
count = 0
for arch in sorted(set().union(*(c.archs for k in backend.kernels for c in k.capabilities))):
    for kernel in backend.kernels:
        for dtype in ("float16", "bfloat16") if arch in ("sm80", "sm90") else ("float16",):
            spec = LinearSpec(4096, 4096, 128, dtype=dtype, device=Device("cuda", "nvidia", arch))
            for source in kernel.sources(spec):
                done = compile_one(kernel.name, spec.device, source)
                assert not done.error, (kernel.name, arch, dtype, done.error)
                count += 1
print(count, "compiled")
"""


@pytest.mark.parametrize("backend", ["gemm", "gemv"])
def test_a_sample_is_right_in_the_interpreter(in_process, backend: str):
    assert "cells" in in_process(SAMPLE, backend, interpret=True)


@pytest.mark.parametrize("backend", ["gemm", "gemv"])
def test_the_kernels_compile(in_process, backend: str):
    assert "compiled" in in_process(COMPILE, backend, interpret=False)
