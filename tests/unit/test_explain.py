"""Plans and refusals as text and as data, word for word: other programs and people read them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from awq_core.capability import Capability
from awq_core.dispatch import choose, make_plan
from awq_core.explain import memory_text, plan_data, plan_line, plan_text, refusal_text
from awq_core.kernel import Backend, Kernel, ResidentLayout
from awq_core.reference import BACKEND as REFERENCE
from awq_core.request import Request
from awq_core.resident import as_stored, checkpoint_bytes
from awq_core.spec import Device, LinearSpec, Rows

SPEC = LinearSpec(256, 64, 32, "gemm", dtype="bfloat16", device=Device("cuda", "nvidia", "sm90"))
STORED = 256 * 64 // 2 + 8 * 64 // 2 + 8 * 64 * 2  # qweight, qzeros and scales


def nothing(*args):
    raise AssertionError


def tiles(nbytes, note=""):
    return ResidentLayout("tiles", nothing, nothing, nothing, nbytes, note)


def make(nbytes=lambda spec: STORED, note="", request=None):
    box = Capability("cuda", frozenset({"gemm"}), frozenset({"bfloat16"}), 250)
    kernels = (
        Kernel("few", "tiles", (replace(box, rows=Rows(1, 8)),), nothing),
        Kernel("many", "gemm", (replace(box, rows=Rows(5)),), nothing),
        Kernel("half", "tiles", (replace(box, dtypes=frozenset({"float16"}), group_sizes=frozenset({128})),), nothing),
    )
    acme = Backend("acme", kernels, (tiles(nbytes, note),))
    layouts = {"gemm": as_stored("gemm"), "tiles": acme.layouts[0]}
    return make_plan(SPEC, [acme, REFERENCE], layouts, request, None, REFERENCE)


def test_plan_text():
    assert plan_text(make()).splitlines() == [
        "K=256 N=64 g=32 gemm bfloat16 on cuda:sm90",
        "  M 1-8 acme.few | M 9+ reference.dequantize",
        "  resident tiles, 1.00x of the checkpoint's bytes",
        "  M 1-8: acme.few (priority 250), before reference.dequantize (priority 10)",
        "  M 9+: reference.dequantize (priority 10)",
        "  refused at M 1:",
        "    acme.many: rows: wants M 5+, got 1",
        "    acme.half: dtype: wants float16, got bfloat16; group_size: wants 128, got 32",
        "  refused at M 9+:",
        "    acme.few: rows: wants M 1-8, got 9",
        "    acme.many: resident: wants a weight kept as gemm, got one kept as tiles",
    ]


def test_plan_text_leaves_nobody_out():
    plan = make(request=Request("acme", "AWQ_CORE_BACKEND=acme"))
    text = plan_text(plan)
    for decision in (plan.decision, *(band.decision for band in plan.bands)):
        for refusal in decision.refused:
            assert f"    {refusal.name}: " in text
            assert all(str(reason) in text for reason in refusal.reasons)


def test_plan_line_of_one_kernel():
    plan = make_plan(SPEC, [REFERENCE], {"gemm": as_stored("gemm")})
    assert plan_line(plan) == "M 1+ reference.dequantize"
    assert "refused" not in plan_text(plan)


def test_memory_in_words():
    assert checkpoint_bytes(SPEC) == STORED
    assert memory_text(make(note="why")) == "resident tiles, 1.00x of the checkpoint's bytes"
    large = make(lambda spec: 2 * STORED, "two copies")
    assert memory_text(large) == "resident tiles, 2.00x of the checkpoint's bytes: two copies"
    assert memory_text(make(lambda spec: 2 * STORED)) == "resident tiles, 2.00x of the checkpoint's bytes"


@pytest.mark.parametrize("nbytes", [lambda spec: 1 // 0, lambda spec: None, lambda: 1])
def test_a_layout_that_cannot_say_its_size(nbytes):
    plan = make(nbytes)
    assert memory_text(plan) == "resident tiles, of unknown size"
    assert plan_data(plan)["resident_bytes"] is None
    assert "of unknown size" in plan_text(plan)


def test_plan_data():
    data = plan_data(make())
    assert json.loads(json.dumps(data)) == data
    too_many = {"rule": "rows", "wanted": "M 1-8", "got": "9"}
    too_few = {"rule": "rows", "wanted": "M 5+", "got": "1"}
    repacked = {"rule": "resident", "wanted": "a weight kept as gemm", "got": "one kept as tiles"}
    half = {
        "kernel": "acme.half",
        "reasons": [
            {"rule": "dtype", "wanted": "float16", "got": "bfloat16"},
            {"rule": "group_size", "wanted": "128", "got": "32"},
        ],
    }
    assert data == {
        "in_features": 256,
        "out_features": 64,
        "group_size": 32,
        "layout": "gemm",
        "zero_point": True,
        "bias": False,
        "dtype": "bfloat16",
        "device": "cuda:sm90",
        "experts": 0,
        "resident": "tiles",
        "resident_bytes": STORED,
        "checkpoint_bytes": STORED,
        "note": "",
        "bands": [
            {
                "first": 1,
                "last": 8,
                "kernel": "acme.few",
                "accepted": ["acme.few", "reference.dequantize"],
                "refused": [{"kernel": "acme.many", "reasons": [repacked, too_few]}, half],
            },
            {
                "first": 9,
                "last": None,
                "kernel": "reference.dequantize",
                "accepted": ["reference.dequantize"],
                "refused": [
                    {"kernel": "acme.few", "reasons": [too_many]},
                    {"kernel": "acme.many", "reasons": [repacked]},
                    half,
                ],
            },
        ],
        "refused": [{"kernel": "acme.many", "reasons": [too_few]}, half],
    }


def test_refusal_text():
    backends = [Backend("acme", (Kernel("none", "*", (), nothing),)), Backend("b", (Kernel("k", "*", (), nothing),))]
    none = "capabilities: wants at least one record, got none declared"
    assert refusal_text(choose(SPEC, 3, backends)).splitlines() == [
        f"no kernel takes {SPEC} at M=3.",
        f"  acme.none: {none}",
        f"  b.k: {none}",
    ]
    forced = Request("acme", 'AwqConfig(version="acme")')
    assert refusal_text(choose(SPEC, 1, backends, forced)).splitlines() == [
        f'AwqConfig(version="acme") asks for backend acme, which refuses {SPEC} at M=1; '
        "leave the request out to let awq-core choose.",
        f"  acme.none: {none}",
    ]
    unknown = Request("acmee", "AWQ_CORE_BACKEND=acmee")
    assert refusal_text(choose(SPEC, 1, backends, unknown)) == (
        "AWQ_CORE_BACKEND=acmee asks for backend acmee, which is not installed; installed are acme, b "
        "(`awq backends` shows what failed to load)."
    )
