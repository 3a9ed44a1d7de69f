"""The kit finds every planted fault, and nothing wrong with the honest toy."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch

from awq_core.api import Backend, Capability, Codes, Kernel, LinearSpec, Reason, ResidentLayout, Rows, Weight
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.testing import conformance

Tensors = Mapping[str, torch.Tensor]

RECORD = Capability(
    device="cpu",
    layouts=frozenset({"gemm"}),
    dtypes=frozenset({"float32", "float16"}),
    priority=120,
    rows=Rows(1, 40),
    group_sizes=frozenset({32, 64, 96}),
    out_multiple=8,
)


def codes_of(spec: LinearSpec, tensors: Tensors) -> Codes:
    return checkpoint_layout("gemm").unpack(tensors, spec.in_features, spec.out_features, spec.group_size)


def prepare(spec: LinearSpec, tensors: Tensors) -> dict[str, torch.Tensor]:
    codes = codes_of(spec, tensors)
    return {"codes": codes.codes, "zeros": codes.zeros, "scales": codes.scales.clone()}


def restore(spec: LinearSpec, tensors: Tensors) -> dict[str, torch.Tensor]:
    return checkpoint_layout("gemm").pack(Codes(tensors["codes"], tensors["zeros"], tensors["scales"]))


def dense(spec: LinearSpec, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(Codes(tensors["codes"], tensors["zeros"], tensors["scales"]), dtype)


def nbytes(spec: LinearSpec) -> int:
    return spec.in_features * spec.out_features + 3 * spec.groups * spec.out_features


def apply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return (x.float() @ weight.dequantize(torch.float32)).to(x.dtype)


TOY = ResidentLayout("toy_bytes", prepare, restore, dense, nbytes)


def toy(
    run: Callable[..., torch.Tensor] = apply, layout: ResidentLayout = TOY, record: Capability = RECORD, **more: object
) -> Backend:
    kernel = Kernel("k", "toy_bytes", (record,), run)
    return Backend("toy", (replace(kernel, **more),), (layout,))


def ignores_zero_points(weight, x, bias):
    t = weight.tensors
    return apply(replace(weight, tensors={**t, "zeros": torch.full_like(t["zeros"], 8)}), x, bias)


def reads_beyond_n(weight, x, bias):
    scales = weight.tensors["scales"]
    beyond = scales.as_strided((1,), (1,), scales.storage_offset() + scales.numel())
    if scales.untyped_storage().nbytes() // 2 <= scales.storage_offset() + scales.numel():
        return apply(weight, x, bias)  # nothing lies there unless the kit puts it there
    y = apply(weight, x, bias)
    y[:, -1] += (beyond * 1e-30).to(y.dtype)
    return y


def leaves_the_tail_unwritten(weight, x, bias):
    y = torch.empty(x.shape[0], weight.spec.out_features, dtype=x.dtype)
    whole = weight.spec.out_features // 16 * 16
    y[:, :whole] = apply(weight, x, bias)[:, :whole]
    return y


def takes_96_for_64(weight, x, bias):
    if weight.spec.group_size != 96:
        return apply(weight, x, bias)
    t, k = weight.tensors, weight.spec.in_features
    rows = (torch.arange(k) // 64).clamp(max=t["scales"].shape[0] - 1)
    w = (t["codes"].float() - t["zeros"].float()[rows]) * t["scales"].float()[rows]
    return (x.float() @ w).to(x.dtype)


def prepares_in_place(spec, tensors):
    out = prepare(spec, tensors)
    tensors["qweight"].bitwise_not_()
    return out


def applies_in_place(weight, x, bias):
    y = apply(weight, x, bias)
    weight.tensors["scales"].mul_(0.5)
    return y


def scales_x_in_place(weight, x, bias):
    y = apply(weight, x, bias)
    x.mul_(2)
    return y


def refuses_in_silence(spec):
    return Reason("", "", "")


def restores_the_wrong_bytes(spec, tensors):
    out = restore(spec, tensors)
    out["scales"] = out["scales"].bfloat16().half()
    return out


def is_wrong_at_17(weight, x, bias):
    y = apply(weight, x, bias)
    if x.shape[0] == 17:
        y[16] *= 1.5
    return y


def accumulates_in_fp16(weight, x, bias):
    w = weight.dequantize(torch.float32)
    y = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float16)
    step = max(16, w.shape[0] // 8)
    for k in range(0, w.shape[0], step):
        y = (y.float() + x[:, k : k + step].float() @ w[k : k + step]).half()
    return y.to(x.dtype)


SHARED = torch.zeros(1 << 16)


def shares_scratch_between_threads(weight, x, bias):
    y = apply(weight, x, bias)
    mine = SHARED[: y.numel()].view_as(y)
    mine.copy_(y)
    for _ in range(200):  # long enough for the other thread to come in between
        mine.add_(1).sub_(1)
    return mine.to(y.dtype, copy=True)


def is_random(weight, x, bias):
    return apply(weight, x, bias) * (1 + 1e-6 * torch.rand(()))


def returns_float32(weight, x, bias):
    return apply(weight, x, bias).float()


def tells_too_little(spec):
    return nbytes(spec) - 1


def takes_everything(weight, x, bias):
    return apply(weight, x, bias)


FAULTS = {
    "numerics": [
        ("ignores zero points", toy(ignores_zero_points)),
        ("leaves the tail unwritten", toy(leaves_the_tail_unwritten)),
        ("computes a declared group size wrongly", toy(takes_96_for_64)),
        ("is wrong only at M=17", toy(is_wrong_at_17)),
        ("returns float32", toy(returns_float32)),
    ],
    "accumulation": [("accumulates in fp16", toy(accumulates_in_fp16))],
    "inputs_untouched": [
        ("prepare writes to the checkpoint", toy(layout=replace(TOY, prepare=prepares_in_place))),
        ("apply writes to the weight", toy(applies_in_place)),
        ("apply writes to x", toy(scales_x_in_place)),
    ],
    "guards": [("reads beyond N", toy(reads_beyond_n))],
    "repeatable": [("random", toy(is_random)), ("shares scratch between threads", toy(shares_scratch_between_threads))],
    "restore": [
        ("is not inverse on save", toy(layout=replace(TOY, restore=restores_the_wrong_bytes))),
        ("says wrong bytes", toy(layout=replace(TOY, nbytes=tells_too_little))),
    ],
    "refusals": [("refuses without a reason", toy(refuses=refuses_in_silence))],
}


def test_the_honest_toy_passes():
    assert [(name, str(case), error) for name, case, error in conformance.failures(toy())] == []


@pytest.mark.parametrize(
    ("check", "backend"),
    [pytest.param(check, backend, id=name) for check, planted in FAULTS.items() for name, backend in planted],
)
def test_finds_the_planted_fault(check: str, backend: Backend):
    assert next(conformance.failures(backend, check), None), f"the kit's check of {check} missed it"


def test_a_backend_that_declares_nothing_fails():
    class Empty(conformance.BackendConformance):
        backend = Backend("empty", ())

    with pytest.raises(AssertionError, match="declares no cell"):
        Empty().test_declares_something()
