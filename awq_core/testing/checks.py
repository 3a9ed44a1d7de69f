"""The checks of the conformance kit: each takes a case and fails by AssertionError with what is wrong, and where."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

# MKL's sums depend on where in memory a matrix happens to lie, unless it is told otherwise before it first runs.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch

from .. import ops
from ..capability import Reason, check
from ..dispatch import choose, make_plan
from ..kernel import ANY_LAYOUT, Backend, ResidentLayout, Weight
from ..layouts import NAMES, checkpoint_layout
from ..layouts import dequantize as dequantize_codes
from ..plugins import registry
from ..reference import BACKEND as REFERENCE
from ..request import Request
from ..resident import as_stored
from .cases import Case, outside
from .data import ZERO_POINTS, Sample, cancelling_sample, guarded, sample

# Unit roundoff of the output dtype; the error of the whole result and of one element in units of it. The factors leave
# room for a weight that is rounded to the activation's dtype before the product, scale and zero apart.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
WHOLE, ELEMENT = 8.0, 6.0


def layouts_of(backend: Backend) -> dict[str, ResidentLayout]:
    """The resident layouts that the backend's kernels may read."""
    offered = {layout.name: layout for layout in backend.layouts}
    return {name: as_stored(name) for name in NAMES} | dict(registry().layouts) | offered


def prepared(case: Case, made: Sample) -> Weight:
    """The sample's weight in the resident layout that the case's kernel reads."""
    reads = case.kernel.reads
    layout = layouts_of(case.backend)[case.spec.layout if reads == ANY_LAYOUT else reads]
    return Weight(made.spec, layout, layout.prepare(made.spec, made.tensors))


def run(case: Case, made: Sample, weight: Weight | None = None) -> torch.Tensor:
    """The kernel's result on poisoned memory: whatever it leaves unwritten is NaN."""
    weight = weight or prepared(case, made)
    with poisoned_memory(), torch.no_grad():
        return case.kernel.apply(weight, made.x, None)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN (or the largest integer) inside the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose one setting is a property
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # Deterministic mode is wanted for the poison alone; cuBLAS and others warn that they are not so.
            warnings.filterwarnings("ignore", message="(?s).*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def assert_close(case: Case, made: Sample, y: torch.Tensor, what: str = "") -> None:
    """Shape, dtype, every element written and near the exact product, the whole result nearer still."""
    where = f"{case}{what}"
    wanted = (made.x.shape[0], made.spec.out_features)
    assert tuple(y.shape) == wanted, f"{where}: returned shape {tuple(y.shape)}, wanted {wanted}"
    assert y.dtype == made.x.dtype, f"{where}: returned {y.dtype} for {made.x.dtype} activations"
    found = y.detach().double().cpu()
    bad = int((~torch.isfinite(found)).sum())
    assert bad == 0, f"{where}: {bad} of {found.numel()} elements are NaN or inf (unwritten, or overflowed)"
    unit = ROUNDOFF[made.spec.dtype]
    # Sums of K terms in float32 have an error of their own, which shows only where the output is float32.
    grown = unit + made.spec.in_features**0.5 * 2.0**-24
    difference = (found - made.exact).abs()
    allowed = ELEMENT * grown * made.bound.clamp(min=1e-6)
    worst = int((difference - allowed).argmax())
    row, column = divmod(worst, found.shape[1])
    assert bool((difference <= allowed).all()), (
        f"{where}: element [{row}, {column}] is {found[row, column]:.6g}, exact is {made.exact[row, column]:.6g}"
    )
    size = made.exact.norm() + 1e-3 * made.bound.norm()
    error = float(difference.norm() / size)
    assert error <= WHOLE * grown, (
        f"{where}: relative error {error:.2e}, {made.spec.dtype} leaves room for {WHOLE * grown:.2e}"
    )


def check_numerics(case: Case) -> None:
    """The declared cell is computed right, with random zero points, and (at the fewest rows) all 0 and all 15."""
    for zeros in ZERO_POINTS if case.rows == case.capability.rows.first and case.spec.zero_point else ("random",):
        made = sample(case.spec, case.rows, zeros=zeros, device=_place(case))
        assert_close(case, made, run(case, made), f", zero points {zeros}")


def check_accumulation(case: Case) -> None:
    """Sums that leave float16's range on the way come out right: the kernel accumulates in float32."""
    wide = 64 * case.spec.group_size
    spec = replace(case.spec, in_features=wide)
    refused = check(case.capability, spec) or case.kernel.refuses(spec)
    if refused or checkpoint_layout(spec.layout).refuses(wide, spec.out_features, spec.group_size):
        spec = case.spec
    made = cancelling_sample(spec, case.rows, device=_place(case))
    y = run(case, made)
    bad = int((~torch.isfinite(y)).sum())
    assert bad == 0, f"{case}: {bad} elements overflowed in a sum that passes 100000: accumulate in float32"
    error = (y.double().cpu() - made.exact).abs()
    sums = (32 + made.spec.in_features**0.5) * ROUNDOFF["float32"] * made.bound
    allowed = 2 * ROUNDOFF[case.spec.dtype] * made.exact.abs() + sums
    worst = float((error / allowed).max())
    assert worst <= 1, f"{case}: {worst:.0f} times the error that float32 accumulation leaves room for"


def check_inputs_untouched(case: Case) -> None:
    """Neither prepare nor apply writes to the checkpoint tensors, the resident tensors or x."""
    made = sample(case.spec, case.rows, device=_place(case))
    stored, x = _copy(made.tensors), made.x.clone()
    weight = prepared(case, made)
    _assert_same(f"{case}: prepare changed the checkpoint's", made.tensors, stored)
    resident = _copy(weight.tensors)
    run(case, made, weight)
    _assert_same(f"{case}: apply changed the resident", weight.tensors, resident)
    _assert_same(f"{case}: apply changed the checkpoint's", made.tensors, stored)
    assert torch.equal(made.x, x), f"{case}: apply changed x"


def check_guards(case: Case) -> None:
    """What lies beside the weight and the activation in memory has no influence on the result."""
    made = sample(case.spec, case.rows, device=_place(case))
    weight = prepared(case, made)
    results = []
    for fill in (0x00, 0xFF, 0x7B):
        tensors = {name: guarded(tensor, fill) for name, tensor in weight.tensors.items()}
        x = guarded(made.x, fill)
        results.append(run(case, replace(made, x=x), Weight(weight.spec, weight.layout, tensors)))
    assert all(torch.equal(results[0], other) for other in results[1:]), (
        f"{case}: the result depends on memory beside its inputs: it reads beyond an edge"
    )


def check_repeatable(case: Case) -> None:
    """Two runs, and runs in two threads at once, give the same bits."""
    made = sample(case.spec, case.rows, device=_place(case))
    weight = prepared(case, made)
    with torch.no_grad():
        first = case.kernel.apply(weight, made.x, None)
        results: list[torch.Tensor] = [case.kernel.apply(weight, made.x, None)]

        def work() -> None:
            with torch.no_grad():
                results.extend(case.kernel.apply(weight, made.x, None) for _ in range(4))

        threads = [threading.Thread(target=work) for _ in range(2)]
        interpreted = case.spec.device.type != _place(case)  # Triton's interpreter is for one thread at a time
        for thread in threads:
            thread.start()
            if interpreted:
                thread.join()
        for thread in threads:
            thread.join()
    assert len(results) == 9, f"{case}: a thread failed"
    assert all(torch.equal(first, other) for other in results), f"{case}: two runs differ"


def check_restore(case: Case) -> None:
    """``restore(prepare(w)) == w`` bit for bit, ``nbytes`` is what it takes, ``dequantize`` is the weight."""
    made = sample(case.spec, 1, device=_place(case))
    weight = prepared(case, made)
    back = weight.layout.restore(made.spec, weight.tensors)
    _assert_same(f"{case}: restore(prepare(w)) differs in", back, made.tensors)
    held = sum(t.numel() * t.element_size() for t in weight.tensors.values())
    told = weight.layout.nbytes(made.spec)
    assert held == told, f"{case}: the resident tensors take {held} bytes, nbytes says {told}"
    codes = checkpoint_layout(made.spec.layout).unpack(
        made.tensors, made.spec.in_features, made.spec.out_features, made.spec.group_size
    )
    exact = dequantize_codes(codes, torch.float64)
    found = weight.dequantize(getattr(torch, made.spec.dtype)).double()
    assert found.shape == exact.shape, f"{case}: dequantize returned {list(found.shape)}, wanted {list(exact.shape)}"
    step = codes.scales.double().repeat_interleave(made.spec.group_size, 0)
    allowed = 8 * ROUNDOFF[made.spec.dtype] * (exact.abs() + 8 * step)
    assert bool(((found - exact).abs() <= allowed).all()), f"{case}: dequantize is not the stored weight"


def check_refusals(case: Case) -> None:
    """Each nearest outside point is refused by the records or the kernel's rule, with reasons that say something."""
    veto = case.kernel.refuses(case.spec)
    assert veto is None or isinstance(veto, Reason), f"{case}: refuses() returned {veto!r}, wanted a Reason or None"
    alone = replace(case.backend, kernels=(case.kernel,))
    for rule, spec, rows in outside(case):
        decision = choose(spec, rows, [alone])
        others = [r for r in case.kernel.capabilities if not check(r, spec, rows)]
        if others:
            continue  # another record of the same kernel declares that cell; its own cases run it
        assert decision.chosen is None, f"{case}: takes {spec} at M={rows}, which none of its records declares"
        for refusal in decision.refused:
            assert refusal.reasons, f"{case}: refuses {spec} ({rule}) without a reason"
            for reason in refusal.reasons:
                assert all((reason.rule, reason.wanted, reason.got)), f"{case}: gives an empty reason {reason!r}"
    if veto is not None:
        assert all((veto.rule, veto.wanted, veto.got)), f"{case}: gives an empty reason {veto!r}"


def check_module(case: Case) -> None:
    """Through the custom op: 1-D to 3-D, empty and strided inputs, bias, gradient, opcheck."""
    if case.spec.device.type != _place(case):
        return  # the plan of an imagined device cannot be bound here
    made = sample(case.spec, max(case.rows, 2), device=_place(case))
    plan = make_plan(
        made.spec,
        [case.backend],
        layouts_of(case.backend),
        Request(case.backend.name, "the conformance kit"),
        last_resort=REFERENCE,
    )
    tensors = plan.resident.prepare(made.spec, made.tensors)
    key = ops.intern_plan(plan, tuple(tensors))
    bias = torch.linspace(-1, 1, made.spec.out_features, device=made.x.device).to(made.x.dtype)

    def call(x: torch.Tensor, with_bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.linear(plan, key, tensors, x, with_bias)

    k, n = made.spec.in_features, made.spec.out_features
    whole = call(made.x)
    assert_close(case, made, whole, ", through the op")
    assert call(made.x[0]).shape == (n,), f"{case}: a 1-D input gives the wrong shape"
    assert call(made.x[None]).shape == (1, made.x.shape[0], n), f"{case}: a 3-D input gives the wrong shape"
    assert call(made.x[:0]).shape == (0, n), f"{case}: an empty input gives the wrong shape"
    strided = torch.stack([made.x, made.x], dim=-1)[..., 0]
    assert torch.equal(call(strided), whole), f"{case}: a strided input gives another result"
    biased = call(made.x, bias).double() - bias.double()
    spread = (biased - whole.double()).abs().max()
    assert spread <= 4 * ROUNDOFF[made.spec.dtype] * (whole.double().abs().max() + 1), f"{case}: bias is not added"
    x = made.x.clone().requires_grad_()
    call(x, bias).sum().backward()  # type: ignore[no-untyped-call]
    dense = plan.resident.dequantize(made.spec, tensors, made.x.dtype)
    wanted = torch.ones_like(whole) @ dense.T
    assert x.grad is not None, f"{case}: no gradient reached x"
    assert torch.allclose(x.grad.double(), wanted.double(), rtol=0.02, atol=0.02 * k**0.5), f"{case}: wrong gradient"
    torch.library.opcheck(
        ops.awq_linear, (made.x, list(tensors.values()), bias, key), test_utils=("test_schema", "test_faketensor")
    )


def _place(case: Case) -> str:
    """Where the tensors of a case lie: on its device, or on the CPU (Triton's interpreter) where it is imagined."""
    kind = case.spec.device.type
    return kind if kind == "cpu" or (kind == "cuda" and torch.cuda.is_available()) else "cpu"


def _copy(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _assert_same(what: str, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted), f"{what} names: {sorted(found)} instead of {sorted(wanted)}"
    for name, tensor in wanted.items():
        other = found[name]
        assert other.dtype == tensor.dtype, f"{what} {name}: {other.dtype} instead of {tensor.dtype}"
        assert other.shape == tensor.shape, f"{what} {name}: shape {list(other.shape)} instead of {list(tensor.shape)}"
        same = torch.equal(other.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert same, f"{what} {name}: other bytes"
