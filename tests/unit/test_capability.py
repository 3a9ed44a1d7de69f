"""Records of kernels: each rule has its reason, and all reasons come at once."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_core.capability import Capability, Reason, check, group_accepted, groups_text, one_of
from awq_core.spec import Device, LinearSpec, Rows

H100 = Device("cuda", "nvidia", "sm90")
SPEC = LinearSpec(256, 64, 32, "gemm", True, False, "float16", H100)
RECORD = Capability("cuda", frozenset({"gemm"}), frozenset({"float16", "bfloat16"}), 200)


def reasons(spec=SPEC, m=None, **fields):
    return [str(reason) for reason in check(replace(RECORD, **fields), spec, m)]


def test_the_problem_inside_the_box_has_no_reason_against_it():
    assert check(RECORD, SPEC) == check(RECORD, SPEC, 1) == check(RECORD, SPEC, 10**9) == ()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device": "cpu"}, "device: wants cpu, got cuda"),
        ({"vendors": frozenset({"amd"})}, "vendor: wants amd, got nvidia"),
        ({"archs": frozenset({"sm80", "sm75", "sm100"})}, "arch: wants sm100, sm75 or sm80, got sm90"),
        ({"layouts": frozenset({"gemv", "marlin"})}, "layout: wants gemv or marlin, got gemm"),
        ({"dtypes": frozenset({"bfloat16"})}, "dtype: wants bfloat16, got float16"),
        ({"group_sizes": frozenset({128, 64})}, "group_size: wants 64 or 128, got 32"),
        ({"group_multiple": 64}, "group_size: wants a multiple of 64, got 32"),
        (
            {"group_sizes": frozenset({16}), "group_multiple": 64},
            "group_size: wants 16 or a multiple of 64, got 32",
        ),
        ({"in_multiple": 512}, "in_features: wants a multiple of 512, got 256"),
        ({"out_multiple": 24}, "out_features: wants a multiple of 24, got 64"),
        ({"in_features": Rows(257)}, "in_features: wants 257+, got 256"),
        ({"out_features": Rows(1, 63)}, "out_features: wants 1-63, got 64"),
        ({"zero_points": frozenset({False})}, "zero_point: wants False, got True"),
        ({"rows": Rows(1, 8)}, "rows: wants M 1-8, got 9"),
    ],
)
def test_each_rule(fields, reason):
    assert reasons(m=9, **fields) == [reason]


def test_m_is_left_out_where_it_is_not_given():
    assert reasons(rows=Rows(5, 8)) == []
    assert [m for m in range(1, 12) if not reasons(m=m, rows=Rows(5, 8))] == [5, 6, 7, 8]


def test_all_reasons_at_once():
    wrong = Capability(
        "cuda",
        frozenset({"gemv"}),
        frozenset({"float32"}),
        200,
        vendors=frozenset({"amd"}),
        archs=frozenset({"gfx942"}),
        rows=Rows(2),
        group_sizes=frozenset({128}),
        in_multiple=512,
        out_multiple=128,
        in_features=Rows(512),
        out_features=Rows(128),
        zero_points=frozenset({False}),
    )
    rules = [reason.rule for reason in check(wrong, SPEC, 1)]
    assert rules == [
        *("vendor", "arch", "layout", "dtype", "group_size", "in_features", "out_features"),
        *("in_features", "out_features", "zero_point", "rows"),
    ]
    # the vendor and arch of another kind of device say nothing
    assert [r.rule for r in check(replace(wrong, device="cpu"), SPEC, 1)] == ["device", *rules[2:]]


def test_reasons_are_plain_data():
    (reason,) = check(replace(RECORD, group_multiple=64), SPEC)
    assert reason == Reason("group_size", "a multiple of 64", "32")


def test_any_device():
    anywhere = replace(RECORD, device="*")
    for device in (H100, Device("cpu"), Device("mps", "apple"), Device("cuda", "amd", "gfx942")):
        assert check(anywhere, replace(SPEC, device=device)) == ()
    only_amd = replace(anywhere, vendors=frozenset({"amd"}))
    assert [str(r) for r in check(only_amd, SPEC)] == ["vendor: wants amd, got nvidia"]


def test_an_empty_field_sets_no_limit():
    free = Capability(
        "*", frozenset(), frozenset(), 0, group_sizes=frozenset(), zero_points=frozenset(), archs=frozenset()
    )
    for zero_point in (True, False):
        odd = LinearSpec(7, 3, 7, "made-up", zero_point, dtype="int8", device=Device("tpu"))
        assert check(free, odd, 1) == ()


@given(st.frozensets(st.integers(1, 300), max_size=4), st.none() | st.integers(1, 64), st.integers(1, 300))
def test_group_rules(sizes, multiple, group_size):
    record = replace(RECORD, group_sizes=sizes, group_multiple=multiple)
    unlimited = not sizes and multiple is None
    listed = group_size in sizes
    divided = multiple is not None and group_size % multiple == 0
    assert group_accepted(record, group_size) == (unlimited or listed or divided)
    assert (groups_text(record) == "any") == unlimited


def test_lists_in_words():
    assert [one_of(frozenset(words)) for words in ((), ("b",), ("b", "a"), ("c", "a", "b"))] == [
        *("any", "b", "a or b", "a, b or c")
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", None),
        ("layouts", "gemm"),  # a string would admit every part of its text
        ("layouts", {"gemm"}),
        ("dtypes", ["float16"]),
        ("dtypes", frozenset({16})),
        ("priority", "high"),
        ("priority", 200.5),
        ("priority", True),
        ("vendors", ("nvidia",)),
        ("archs", frozenset({90})),
        ("rows", (1, 8)),
        ("rows", None),
        ("group_sizes", frozenset({"128"})),
        ("group_sizes", 128),
        ("group_multiple", 0),
        ("in_multiple", 0),
        ("out_multiple", 16.0),
        ("in_features", range(8)),
        ("zero_points", True),
        ("zero_points", frozenset({"True"})),
        ("compile_safe", "yes"),
        ("tested", ["sm90"]),
    ],
)
def test_a_wrong_type_shows_when_the_record_is_made(field, value):
    with pytest.raises(ValueError, match=rf"^Capability\.{field} must be .*, not "):
        replace(RECORD, **{field: value})
