"""The epilogues of ``gemv.few`` in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from awq_core.api import Weight
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.selection import select
from awq_core.spec import Device, LinearSpec
from awq_core.testing.data import random_codes
from awq_gemv import launch
from awq_core.plugins import registry

layout = next(b for b in registry().backends.values() if b.name == "gemm").layouts[0]
assert layout.name == "awq_fragments", layout.name
g = torch.Generator().manual_seed(0)


def weight(k, n, dtype, group=64):
    spec = LinearSpec(k, n, group, dtype=dtype, device=Device("cuda", "nvidia", "sm90"))
    codes = random_codes(spec, g)
    made = Weight(spec, layout, layout.prepare(spec, checkpoint_layout("gemm").pack(codes)))
    return made, dequantize(codes, torch.float32).double()


def near(got, wanted, limit):
    error = (got.double() - wanted).norm() / wanted.norm()
    assert error < limit, float(error)


for dtype, limit in (("float16", 2e-3), ("bfloat16", 2e-2)):
    kind = getattr(torch, dtype)
    draw = lambda *shape, scale=1.0: (torch.randn(*shape, generator=g) * scale).to(kind)
    for rows, k, n in ((1, 256, 352), (3, 192, 288), (16, 128, 64)):
        made, exact = weight(k, n, dtype)
        x, bias, other = draw(rows, k), draw(n), draw(rows, n)
        y = x.double() @ exact
        near(launch.few(made, x, None), y, limit)
        near(launch.few(made, x, bias), y + bias.double(), limit)
        near(launch.add(made, x, other), y + other.double(), limit)
        near(launch.silu_mul(made, x), torch.nn.functional.silu(y[:, : n // 2]) * y[:, n // 2 :], limit)
    assert not launch.counters(x.device).any()
print("done")
"""


def test_epilogues_are_the_operations_that_they_replace() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done" in done.stdout
