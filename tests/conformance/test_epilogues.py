"""Epilogues of ``gemv`` in Triton's interpreter, which must be chosen before Triton is imported."""

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from awq_core.api import Normed, Weight
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
    # What ``gemv.one`` does where its own kernel cannot run.
    made, exact = weight(256, 352, dtype, 128)
    x, plus, w, bias, out = draw(1, 256), draw(1, 256), draw(256), draw(352), torch.empty(1, 256, dtype=kind)
    for offset in (False, True):
        stream = (x + plus).double()
        row = stream * torch.rsqrt(stream.square().mean() + 1e-5) * (w.double() + offset)
        normed = Normed(x, plus, w, 1e-5, offset, out)
        near(launch.one_norm(made, normed, bias), row @ exact + bias.double(), 2 * limit)
        gate, up = (row @ exact).split(176, 1)
        near(launch.one_norm_silu_mul(made, normed), torch.nn.functional.silu(gate) * up, 2 * limit)
        assert torch.equal(out, x + plus)
    assert not launch.counters(x.device).any()
print("done")
"""


def test_epilogues_are_the_operations_that_they_replace(in_process) -> None:
    assert "done" in in_process(CODE, interpret=True)
