"""What ``awq tune`` tries computes the product, in Triton's interpreter (chosen before Triton is imported)."""

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from awq_core.api import Weight
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.plugins import registry
from awq_core.spec import Device, LinearSpec
from awq_core.testing.data import random_codes
from awq_core.tuning import trial

backends = {b.name: b for b in registry().backends.values()}
layout = backends["gemm"].layouts[0]
g = torch.Generator().manual_seed(0)
spec = LinearSpec(384, 200, 128, device=Device("cuda", "nvidia", "sm90"))
codes = random_codes(spec, g)
weight = Weight(spec, layout, layout.prepare(spec, checkpoint_layout("gemm").pack(codes)))
exact = dequantize(codes, torch.float32).double()
tried = 0
for name, rows in (("gemv.few", (3, 16)), ("gemm.tiles", (1, 30, 70))):
    backend, kernel = name.split(".")
    (kernel,) = (k for k in backends[backend].kernels if k.name == kernel)
    for m in rows:
        x = torch.randn(m, 384, generator=g).half()
        wanted = x.double() @ exact
        seen = set()
        for config in kernel.tunables(spec, m):
            key = tuple(value for key, value in config.items() if key not in ("stages", "warps"))
            if key in seen:  # the interpreter knows neither
                continue
            seen.add(key)
            with trial(name, config):
                y = kernel.apply(weight, x, None).double()
            assert (y - wanted).norm() < 2e-3 * wanted.norm(), (name, m, config)
            tried += 1
print(tried, "tried")
"""


def test_every_config_computes_the_product(in_process) -> None:
    assert "30 tried" in in_process(CODE, interpret=True)
