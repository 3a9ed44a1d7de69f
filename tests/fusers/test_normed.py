"""When the linears of a decode step take the norms in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from awq_core.linear import AwqLinear
from awq_fusers.decode import gpu_step, linears
from awq_fusers.decode.model import Norm


def decoder(hidden: int = 256, dtype: torch.dtype = torch.float16, bias: bool = False, parts: int = 1, **changes):
    """Two layers, of which the second differs as ``changes`` say."""

    def layer(activation: str = "silu", after: bool = False, norm: torch.dtype = dtype):
        made = Norm(torch.ones(hidden, dtype=norm), 1e-5)
        return SimpleNamespace(
            before_attention=made,
            before_mlp=made,
            after_attention=made if after else None,
            after_mlp=None,
            attention=SimpleNamespace(qkv=tuple(AwqLinear(hidden, 256, bias=True) for _ in range(parts))),
            mlp=SimpleNamespace(
                activation=activation, gate_up=(AwqLinear(hidden, 512, bias=bias),), down=AwqLinear(256, hidden)
            ),
        )

    return SimpleNamespace(dtype=dtype, layers=[layer(), layer(**changes)])


@pytest.fixture
def able(monkeypatch):
    """As if each linear had a kernel that can make its row."""
    monkeypatch.setattr(linears, "_variant", lambda module, rows, name: lambda *row: (name, *row))


def test_all_layers_or_none(able):
    found = gpu_step.normed_linears(decoder())
    assert len(found) == 2
    (name, row, bias), (gate, _) = found[1][0]("row"), found[1][1]("row")
    assert (name, row, gate) == ("norm", "row", "norm_silu_mul")
    assert bias.shape == (256,)


@pytest.mark.parametrize(
    "different",
    [
        {"activation": "gelu"},
        {"after": True},
        {"norm": torch.float32},
        {"hidden": 12288},
        {"bias": True},
        {"parts": 3},
    ],
    ids=lambda different: next(iter(different)),
)
def test_what_keeps_norms_in_kernels_of_their_own(able, different):
    assert gpu_step.normed_linears(decoder(**different)) is None


def test_a_kernel_that_cannot(monkeypatch):
    monkeypatch.setattr(linears, "_variant", lambda *_: None)
    assert gpu_step.normed_linears(decoder()) is None
