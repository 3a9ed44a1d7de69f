"""The dispatcher on made-up records: ranking, plans by M, the user's word, and who is asked what, and when."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_core.capability import Capability, Reason
from awq_core.dispatch import Candidate, choose, make_plan
from awq_core.errors import LayoutError, NoKernelError
from awq_core.kernel import Backend, Kernel, ResidentLayout
from awq_core.reference import BACKEND as REFERENCE
from awq_core.request import Request
from awq_core.spec import Device, LinearSpec, Rows

SPEC = LinearSpec(256, 64, 32, "gemm", device=Device("cuda", "nvidia", "sm90"))
FORCED = "AwqConfig(version=...)"


def nothing(*args):
    raise AssertionError("the dispatcher runs no kernel and prepares no weight")


def layout(name):
    return ResidentLayout(name, nothing, nothing, nothing, lambda spec: 1000)


LAYOUTS = {name: layout(name) for name in ("gemm", "gemv", "tiles", "strips")}


def record(priority=200, first=1, last=None, **fields):
    wanted = {"device": "cuda", "layouts": frozenset({"gemm"}), "dtypes": frozenset({"float16"})}
    return Capability(**wanted | {"priority": priority, "rows": Rows(first, last)} | fields)


def kernel(name, *records, reads="*", **fields):
    return Kernel(name, reads, records or (record(),), nothing, **fields)


def backend(name, *kernels, **fields):
    return Backend(name, kernels or (kernel("k"),), **fields)


def names(decision):
    return [candidate.name for candidate in decision.accepted]


def against(decision):
    return {refusal.name: [str(reason) for reason in refusal.reasons] for refusal in decision.refused}


def bands(plan):
    return {str(band.rows): band.candidate.name for band in plan.bands}


def plan_of(*backends, request=None, probe=None, last_resort=REFERENCE, spec=SPEC, resident=None):
    return make_plan(spec, backends, LAYOUTS, request, probe, last_resort, resident)


# One M


def test_the_rank_is_priority_then_no_repacking_then_name():
    some = [
        backend("c", kernel("slow", record(110)), kernel("fast", record(300), reads="tiles")),
        backend("b", kernel("k", record(200), reads="tiles"), kernel("a", record(200), reads="gemm")),
        backend("a", kernel("z", record(200), reads="strips"), kernel("y", record(200))),
    ]
    assert names(choose(SPEC, 1, some)) == ["c.fast", "a.y", "b.a", "a.z", "b.k", "c.slow"]


def test_a_kernel_stands_with_its_best_accepting_record():
    many = kernel("k", record(150), record(250, 1, 8), record(290, dtypes=frozenset({"float32"})))
    assert [choose(SPEC, m, [backend("a", many)]).chosen.capability.priority for m in (1, 8, 9)] == [250, 250, 150]


def test_a_refused_kernel_shows_its_nearest_record():
    far = record(layouts=frozenset({"gemv"}), dtypes=frozenset({"float32"}))
    near = record(group_sizes=frozenset({128}))
    decision = choose(SPEC, 1, [backend("a", kernel("k", far, near)), backend("b", Kernel("none", "*", (), nothing))])
    assert decision.chosen is None
    assert against(decision) == {
        "a.k": ["group_size: wants 128, got 32"],
        "b.none": ["capabilities: wants at least one record, got none declared"],
    }


def test_all_reasons_of_all_kinds_stand_together():
    wrong = kernel("k", record(dtypes=frozenset({"float32"}), group_multiple=64), reads="tiles")
    request = Request("b", FORCED, disabled=frozenset({"a", "a.k"}))
    decision = choose(SPEC, 1, [backend("a", wrong)], request, resident="gemm")
    assert against(decision)["a.k"] == [
        f"request: wants backend b ({FORCED}), got backend a",
        "request: wants a kernel that is not disabled, got a in AWQ_CORE_DISABLE",
        "request: wants a kernel that is not disabled, got a.k in AWQ_CORE_DISABLE",
        "resident: wants a weight kept as tiles, got one kept as gemm",
        "dtype: wants float32, got float16",
        "group_size: wants a multiple of 64, got 32",
    ]


# Who is asked, and when


def test_refuses_is_asked_only_after_a_record_has_accepted():
    asked = []

    def refuses(spec):
        asked.append(spec.dtype)
        return Reason("made-up", "luck", "none")

    a = backend("a", kernel("k", record(dtypes=frozenset({"bfloat16"})), refuses=refuses))
    assert against(choose(SPEC, 1, [a]))["a.k"] == ["dtype: wants bfloat16, got float16"]
    assert asked == []
    assert against(choose(replace(SPEC, dtype="bfloat16"), 1, [a]))["a.k"] == ["made-up: wants luck, got none"]
    assert asked == ["bfloat16"]


def raising(spec):
    raise ZeroDivisionError("no luck\nat all")


@pytest.mark.parametrize(
    ("refuses", "got"),
    [
        (raising, "ZeroDivisionError: no luck at all"),
        (lambda spec: "K is odd", "'K is odd'"),
        (lambda spec: False, "False"),
    ],
)
def test_a_broken_refuses_is_a_refusal_and_the_others_go_on(refuses, got):
    decision = choose(SPEC, 1, [backend("a", kernel("k", refuses=refuses)), backend("b")])
    assert names(decision) == ["b.k"]
    (refusal,) = decision.refused
    assert [(r.rule, r.got) for r in refusal.reasons] == [("refuses", got)]


def test_the_probe_is_asked_only_where_nothing_else_refuses():
    asked = []

    def probe(backend, device):
        asked.append((backend.name, device))
        return "no compiler" if backend.name == "d" else None

    some = [
        backend("a", kernel("k", record(device="cpu"))),
        backend("b", kernel("k", refuses=lambda spec: Reason("x", "y", "z"))),
        backend("c"),
        backend("d"),
        backend("e"),
        backend("f", kernel("k", reads="tiles")),
    ]
    decision = choose(SPEC, 1, some, Request(disabled=frozenset({"e"})), probe, resident="gemm")
    assert asked == [("c", SPEC.device), ("d", SPEC.device)]
    assert names(decision) == ["c.k"]
    assert against(decision)["d.k"] == ["available: wants backend d to run here, got no compiler"]


def test_an_imagined_device_asks_no_probe():
    assert bands(plan_of(backend("a", probe=nothing))) == {"1+": "a.k"}


# Plans


def test_the_winner_at_one_row_fixes_the_layout():
    decode = backend("decode", kernel("k", record(250, 1, 8), reads="tiles"))
    prefill = backend(
        "prefill", kernel("k", record(290, 2), reads="strips"), kernel("same", record(120), reads="tiles")
    )
    plan = plan_of(decode, prefill)
    assert plan.resident is LAYOUTS["tiles"]
    assert bands(plan) == {"1-8": "decode.k", "9+": "prefill.same"}
    assert against(plan.bands[1].decision)["prefill.k"] == [
        "resident: wants a weight kept as strips, got one kept as tiles"
    ]


def test_a_kernel_that_reads_anything_keeps_the_checkpoint_layout():
    assert plan_of(backend("a")).resident is LAYOUTS["gemm"]
    assert plan_of(REFERENCE, spec=replace(SPEC, layout="gemv")).resident is LAYOUTS["gemv"]


def test_bands_lie_at_the_edges_and_equal_neighbours_are_one():
    a = backend(
        "a", kernel("few", record(250, 1, 4)), kernel("some", record(240, 3, 16)), kernel("many", record(230, 64))
    )
    other = backend("b", kernel("slow", record(100, 1, 9), record(100, 30)))
    plan = plan_of(a, other, REFERENCE)
    assert bands(plan) == {
        "1-4": "a.few",
        "5-16": "a.some",
        "17-29": "reference.dequantize",
        "30-63": "b.slow",
        "64+": "a.many",
    }


def test_every_band_names_every_kernel():
    a = backend(
        "a", kernel("few", record(250, 1, 4), reads="tiles"), kernel("some", record(240, 3, 16), reads="strips")
    )
    plan = plan_of(a, backend("b"), REFERENCE)
    everything = {"a.few", "a.some", "b.k", "reference.dequantize"}
    for decision in (plan.decision, *(band.decision for band in plan.bands)):
        told = [*names(decision), *against(decision)]
        assert sorted(told) == sorted(everything)


def test_the_last_resort_fills_holes_also_when_a_backend_is_forced():
    few = backend("few", kernel("k", record(250, 1, 8)))
    other = backend("other", kernel("k", record(290)))
    plan = plan_of(few, other, REFERENCE, request=Request("few", FORCED))
    assert bands(plan) == {"1-8": "few.k", "9+": "reference.dequantize"}
    hole = plan.bands[1].decision
    assert list(against(hole)) == ["few.k", "other.k"]  # the one that was taken is not refused as well
    assert hole.request.forced == "few"


@pytest.mark.parametrize("last_resort", [None, REFERENCE])
def test_a_hole_that_nothing_may_fill_is_an_error(last_resort):
    few = backend("few", kernel("k", record(250, 1, 8)))
    request = Request(disabled=frozenset({"reference"}))
    with pytest.raises(NoKernelError, match="at M=9") as caught:
        plan_of(few, last_resort=last_resort, request=request)
    assert caught.value.decision.m == 9
    assert "rows: wants M 1-8, got 9" in str(caught.value)


def test_a_given_resident_layout_admits_only_its_readers():
    repacks = backend("a", kernel("tiles", record(290), reads="tiles"), kernel("stored", record(120), reads="gemm"))
    plan = plan_of(repacks, REFERENCE, resident="gemm")
    assert bands(plan) == {"1+": "a.stored"}
    assert plan.resident is LAYOUTS["gemm"]
    assert plan_of(REFERENCE, resident="tiles").resident is LAYOUTS["tiles"]
    only = backend("b", kernel("tiles", record(290), reads="tiles"))
    with pytest.raises(NoKernelError, match="backend b, which refuses") as caught:
        plan_of(only, REFERENCE, request=Request("b", FORCED), resident="gemm")
    assert "b.tiles: resident: wants a weight kept as tiles, got one kept as gemm" in str(caught.value)


def test_a_layout_that_does_not_exist():
    with pytest.raises(LayoutError, match="layout 'odd' does not exist: the layouts are gemm, gemv, strips, tiles"):
        plan_of(REFERENCE, spec=replace(SPEC, layout="odd"))


def test_a_plan_is_compile_safe_if_all_its_kernels_are():
    few = backend("a", kernel("few", record(250, 1, 4, compile_safe=False)), kernel("many", record(100, 5)))
    assert not plan_of(few).compile_safe
    assert plan_of(backend("a", kernel("few", record(250, 1, 4)), kernel("many", record(100, 5)))).compile_safe


# The user's word


def test_forced_means_forced():
    slow, fast = backend("slow", kernel("k", record(100))), backend("fast", kernel("k", record(290)))
    plan = plan_of(slow, fast, request=Request("slow", FORCED))
    assert bands(plan) == {"1+": "slow.k"}
    assert against(plan.decision)["fast.k"] == [f"request: wants backend slow ({FORCED}), got backend fast"]


def test_forced_and_refused_raises_with_every_reason():
    wrong = kernel("k", record(dtypes=frozenset({"float32"}), group_multiple=64, out_multiple=128))
    other = kernel("gone", refuses=lambda spec: Reason("moon", "full", "new"))
    with pytest.raises(NoKernelError) as caught:
        plan_of(backend("a", wrong, other), backend("b"), REFERENCE, request=Request("a", FORCED))
    text = str(caught.value)
    assert text.startswith(f"{FORCED} asks for backend a, which refuses {SPEC} at M=1; leave the request out")
    own = [refusal for refusal in caught.value.decision.refused if refusal.name.startswith("a.")]
    assert len(own) == 2
    assert all(str(reason) in text for refusal in own for reason in refusal.reasons)
    assert "b.k" not in text


def test_forced_and_unknown_names_what_is_installed():
    with pytest.raises(
        NoKernelError, match="backend acme, which is not installed; installed are a, reference"
    ) as caught:
        plan_of(REFERENCE, backend("a"), request=Request("acme", FORCED))
    assert set(against(caught.value.decision)) == {"a.k", "reference.dequantize"}


def test_preferred_backends_rank_first_and_give_way():
    some = [backend("a", kernel("k", record(290))), backend("b", kernel("k", record(10))), backend("c")]
    assert names(choose(SPEC, 1, some, Request(preferred=("b", "c")))) == ["b.k", "c.k", "a.k"]
    refusing = [*some[:1], backend("b", kernel("k", record(dtypes=frozenset({"float32"})))), some[2]]
    assert names(choose(SPEC, 1, refusing, Request(preferred=("b", "c", "nowhere")))) == ["c.k", "a.k"]


def test_disabled_backends_and_kernels_are_out():
    two = backend("a", kernel("k", record(290)), kernel("j", record(280)))
    assert names(choose(SPEC, 1, [two, backend("b")], Request(disabled=frozenset({"a"})))) == ["b.k"]
    assert names(choose(SPEC, 1, [two, backend("b")], Request(disabled=frozenset({"a.k"})))) == ["a.j", "b.k"]
    with pytest.raises(NoKernelError, match=r"got a in AWQ_CORE_DISABLE"):
        plan_of(two, last_resort=REFERENCE, request=Request("a", FORCED, disabled=frozenset({"a"})))


def test_nothing_at_all():
    with pytest.raises(NoKernelError, match="no kernel takes K=256"):
        plan_of()
    with pytest.raises(NoKernelError, match="installed are none"):
        plan_of(request=Request("a", FORCED))


# Properties

a_record = st.builds(
    lambda first, more, **fields: record(first=first, last=None if more is None else first + more, **fields),
    first=st.integers(1, 40) | st.just(1),
    more=st.none() | st.integers(0, 150),
    priority=st.sampled_from([10, 100, 150, 200]),
    dtypes=st.sampled_from([frozenset({"float16"}), frozenset(), frozenset({"float32"})]),
    group_sizes=st.sampled_from([frozenset(), frozenset({32}), frozenset({128})]),
)
a_kernel = st.builds(
    lambda records, reads: (records, reads),
    st.lists(a_record, max_size=3),
    st.sampled_from(["*", "gemm", "tiles", "strips"]),
)
some_backends = st.lists(st.lists(a_kernel, min_size=1, max_size=3), max_size=4).map(
    lambda drawn: [
        Backend(f"b{i}", tuple(Kernel(f"k{j}", reads, tuple(rs), nothing) for j, (rs, reads) in enumerate(ks)))
        for i, ks in enumerate(drawn)
    ]
)
a_request = st.builds(
    Request,
    preferred=st.lists(st.sampled_from(["b0", "b1", "b2"]), unique=True, max_size=2).map(tuple),
    disabled=st.frozensets(st.sampled_from(["b0", "b1.k0", "b2"]), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(some_backends, a_request)
def test_a_plan_is_the_best_reader_at_every_m(backends, request):
    everything = [*backends, REFERENCE]
    plan = make_plan(SPEC, everything, LAYOUTS, request, None, REFERENCE)
    winner = choose(SPEC, 1, everything, request).chosen
    assert plan.decision.chosen == plan.bands[0].candidate == winner
    assert plan.resident is LAYOUTS["gemm" if winner.kernel.reads == "*" else winner.kernel.reads]
    assert all(band.candidate.kernel.reads in ("*", plan.resident.name) for band in plan.bands)
    readers = [Backend(b.name, tuple(k for k in b.kernels if k.reads in ("*", plan.resident.name))) for b in everything]
    for m in range(1, 301):
        assert plan.kernel(m) is choose(SPEC, m, readers, request).chosen.kernel
    # without holes, and no two neighbours alike
    assert [band.rows.first for band in plan.bands] == [1, *(band.rows.last + 1 for band in plan.bands[:-1])]
    assert plan.bands[-1].rows.last is None
    candidates: list[Candidate] = [band.candidate for band in plan.bands]
    assert all(one != two for one, two in itertools.pairwise(candidates))


@settings(max_examples=40, deadline=None)
@given(some_backends, a_request, st.randoms(use_true_random=False))
def test_the_order_of_registration_does_not_matter(backends, request, random):
    def shuffled(items):
        return tuple(random.sample(items, len(items)))

    first = make_plan(SPEC, [*backends, REFERENCE], LAYOUTS, request, None, REFERENCE)
    again = [replace(b, kernels=shuffled(b.kernels)) for b in shuffled([*backends, REFERENCE])]
    second = make_plan(SPEC, again, LAYOUTS, request, None, REFERENCE)
    assert bands(first) == bands(second)
    assert first.resident is second.resident
    assert [names(band.decision) for band in first.bands] == [names(band.decision) for band in second.bands]
    assert against(first.decision) == against(second.decision)
    told = [[name.split(".")[0] for name in against(plan.decision)] for plan in (first, second)]
    assert told[0] == told[1]


# Records that would break a choice cannot be made


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Kernel("k", "*", (record(),), None), "Kernel 'k': apply must be a function, not None"),
        (lambda: Kernel("k", "*", [record()], nothing), "Kernel 'k': capabilities must be a tuple of Capability"),
        (lambda: Kernel("k", "*", ("cuda",), nothing), "Kernel 'k': capabilities must be a tuple of Capability"),
        (lambda: Kernel("k", None, (), nothing), "Kernel 'k': reads must be the name of a layout, not None"),
        (lambda: Kernel("a.k", "*", (), nothing), "Kernel.name must be a name of a-z"),
        (lambda: kernel("k", refuses=False), "Kernel 'k': refuses must be a function"),
        (lambda: kernel("k", adds_bias="no"), "Kernel 'k': adds_bias must be True or False"),
        (lambda: backend("Acme"), "Backend.name must be a name of a-z, 0-9, _ and -, not 'Acme'"),
        (lambda: backend("a,b"), "Backend.name must be a name"),
        (lambda: backend(None), "Backend.name must be a name"),
        (lambda: Backend("a", kernel("k")), "Backend 'a': kernels must be a tuple of Kernel"),
        (lambda: backend("a", kernel("k"), kernel("k")), "Backend 'a': kernels must be of different names"),
        (lambda: backend("a", layouts=("tiles",)), "Backend 'a': layouts must be a tuple of ResidentLayout"),
        (lambda: backend("a", probe="yes"), "Backend 'a': probe must be a function"),
        (lambda: layout("*"), "ResidentLayout.name must be a name"),
        (lambda: replace(layout("a"), nbytes=1000), "ResidentLayout 'a': nbytes must be a function, not 1000"),
        (lambda: replace(layout("a"), note=None), "ResidentLayout 'a': note must be a text"),
    ],
)
def test_a_wrong_type_shows_when_the_record_is_made(make, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value).startswith(words)
