"""The golden matrix is up to date, and what holds in each of its cells."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_core.capability import check
from awq_core.cli.matrix import built_in
from awq_core.errors import NoKernelError
from awq_core.kernel import ANY_LAYOUT
from awq_core.request import Request

_spec = importlib.util.spec_from_file_location("regenerate", Path(__file__).with_name("regenerate.py"))
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

FOUND = built_in()
CELLS = list(golden.problems())
SPECS = [spec for *_, spec in CELLS]
MANY = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 511, 512, 513, 4096, 1 << 20)


def test_the_golden_matrix_is_up_to_date():
    assert golden.PATH.read_text("utf-8") == golden.document(FOUND), "run: python tests/matrix/regenerate.py"


def test_another_declaration_makes_it_stale():
    cpu = FOUND.backends["cpu"]
    last = replace(cpu.kernels[-1], capabilities=())
    changed = {**FOUND.backends, "cpu": replace(cpu, kernels=(*cpu.kernels[:-1], last))}
    assert golden.document(replace(FOUND, backends=MappingProxyType(changed))) != golden.PATH.read_text("utf-8")


def test_every_device_layout_and_group_size_is_there():
    assert len({device for device, *_ in CELLS}) == 13
    for place, wanted in ((1, golden.DTYPES), (2, golden.NAMES), (3, golden.GROUPS)):
        assert {cell[place] for cell in CELLS} == set(wanted)


@pytest.mark.parametrize("device", golden.DEVICES)
def test_a_plan_has_no_holes_and_one_layout(device):
    for name, *_, spec in CELLS:
        if name != device:
            continue
        plan = golden.make_plan(FOUND, spec)
        edges = [(band.rows.first, band.rows.last) for band in plan.bands]
        assert edges[0][0] == 1, spec
        assert edges[-1][1] is None, spec
        assert all(last + 1 == first for (_, last), (first, _) in pairwise(edges)), spec
        for m in MANY:
            (band,) = [band for band in plan.bands if m in band.rows]
            assert plan.kernel(m) is band.candidate.kernel
            assert band.candidate.kernel.reads in (ANY_LAYOUT, plan.resident.name), f"{spec} at M={m}"
            assert check(band.candidate.capability, spec, m) == (), f"{spec} at M={m}"


@settings(max_examples=150, deadline=None)
@given(st.permutations(sorted(FOUND.backends)), st.sampled_from(SPECS))
def test_the_order_of_registration_does_not_matter(names, spec):
    shuffled = replace(FOUND, backends=MappingProxyType({name: FOUND.backends[name] for name in names}))
    assert golden.make_plan(shuffled, spec) == golden.make_plan(FOUND, spec)


def against(kernel, spec):
    """The reasons of the record that comes nearest, else the kernel's own."""
    nearest = min((check(record, spec, 1) for record in kernel.capabilities), key=len)
    return nearest or tuple(filter(None, [kernel.refuses(spec)]))


@pytest.mark.parametrize("name", sorted(FOUND.backends))
def test_forced_is_taken_or_refused_with_every_reason(name):
    kernels = {kernel.name: kernel for kernel in FOUND.backends[name].kernels}
    for spec in SPECS:
        refused = {key: against(kernel, spec) for key, kernel in kernels.items()}
        request = Request(name, f"AWQ_CORE_BACKEND={name}")
        if all(refused.values()):
            with pytest.raises(NoKernelError) as caught:
                golden.make_plan(FOUND, spec, request)
            text = str(caught.value)
            assert f"AWQ_CORE_BACKEND={name} asks for backend {name}, which refuses {spec} at M=1" in text
            for kernel, reasons in refused.items():
                assert f"{name}.{kernel}: " + "; ".join(map(str, reasons)) in text
        else:
            assert golden.make_plan(FOUND, spec, request).bands[0].candidate.backend == name
