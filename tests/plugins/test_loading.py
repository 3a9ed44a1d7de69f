"""The plugin loader on real distributions: each is written to a folder with its metadata, then found and imported.

A broken plugin is recorded with one line and disturbs nobody; asking for it by name raises that line.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from pathlib import Path

import pytest

from awq_core import notice, plugins
from awq_core.errors import NoKernelError, PluginError
from awq_core.plugins import GROUPS, load
from awq_core.request import Request
from awq_core.selection import select
from awq_core.spec import Device, LinearSpec

SPEC = LinearSpec(256, 64, 32, "gemm", dtype="bfloat16", device=Device("cuda", "nvidia", "sm90"))
BUILT_IN = ["reference"]
OURS = "awq-core"

HEAD = """
from awq_core.api import Backend, Capability, Kernel, LinearSpec, ResidentLayout, hookimpl

PLUGIN_API = 1


def run(weight, x, bias):
    return x @ weight.dequantize(x.dtype)


def same(spec, tensors):
    return dict(tensors)


def box(priority=200, **fields):
    wanted = {"device": "*", "layouts": frozenset({"gemm"}), "dtypes": frozenset({"bfloat16"}), "priority": priority}
    return Capability(**wanted | fields)


def backend(name, priority=200, reads="*", layouts=(), **fields):
    return Backend(name, (Kernel("k", reads, (box(priority),), run),), layouts, **fields)


def layout(name):
    return ResidentLayout(name, same, same, run, lambda spec: 1)


"""
OFFER = HEAD + "@hookimpl\ndef awq_core_backends():\n    return [{}]\n"


def offers(*backends):
    """The source of a plugin that offers these backends, each an expression in terms of HEAD."""
    return OFFER.replace("[{}]", f"[{', '.join(backends)}]")


class Environment:
    """A folder with distributions, as pip leaves them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[importlib.metadata.EntryPoint] = []
        self._numbers = itertools.count()

    def install(self, name, source, dist=None, version="1.0", group=GROUPS[0]):
        """A distribution whose entry point ``name`` is a module with this source."""
        module = f"made_up_plugin_{next(self._numbers)}"
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        if dist != "":
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {dist or 'awq-' + name}\nVersion: {version}\n"
            )
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")
        self.points += importlib.metadata.Distribution.at(info).entry_points
        return module

    def load(self, allow=None):
        return load(self.points, allow)


@pytest.fixture
def env(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Environment(tmp_path)
    for module in [name for name in sys.modules if name.startswith("made_up_plugin_")]:
        del sys.modules[module]


def errors(registry):
    return {str(failure.source): failure.error for failure in registry.failures}


def test_a_plugin_is_found_with_its_origin(env):
    env.install("acme", offers('backend("acme")'), "acme-kernels", "2.1")
    found = env.load()
    assert list(found.backends) == [*BUILT_IN, "acme"]
    assert str(found.sources["acme"]) == "acme (acme-kernels 2.1)"
    assert found.backend("acme") is found.backends["acme"]
    assert found.sources["reference"].distribution == OURS
    assert list(found.layouts) == ["gemm", "gemv", "gemv_fast", "llm_awq", "marlin"]
    assert all(found.sources[f"layout:{name}"].distribution == OURS for name in found.layouts)
    assert found.failures == found.left_out == found.fusers == ()
    with pytest.raises(TypeError):
        found.backends["acme"] = None


BROKEN = {
    "import error": ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    "syntax error": ("def f(:\n", "SyntaxError: "),
    "exits": ("raise SystemExit('no GPU,\\n good bye')", "SystemExit: no GPU, good bye"),
    "exits without a word": ("import sys; sys.exit()", "SystemExit: no message"),
    "panics": ("class Panic(BaseException): ...\nraise Panic('rust')", "Panic: rust"),
    "error without text": (
        "class Odd(Exception):\n    def __str__(self): return self.gone\nraise Odd",
        "Odd: no message",
    ),
    "raising hook": (HEAD + "@hookimpl\ndef awq_core_backends():\n    return [][0]\n", "IndexError: list index out of"),
    "hook that raises later": (HEAD + "@hookimpl\ndef awq_core_backends():\n    yield 1 / 0\n", "ZeroDivisionError: "),
    "hook with arguments": (
        HEAD + "@hookimpl\ndef awq_core_backends(device):\n    return []\n",
        "PluginValidationError: ",
    ),
    "unknown hook": (
        HEAD + "@hookimpl\ndef awq_core_backend():\n    return []\n",
        "PluginValidationError: unknown hook",
    ),
    "no list": (OFFER.replace("[{}]", 'backend("x")'), "TypeError: 'Backend' object is not iterable"),
    "wrong type": (offers('"acme"'), "its hook returned str where awq_core.api.Backend is wanted"),
    "wrong layout": (
        HEAD + "@hookimpl\ndef awq_core_layouts():\n    return [None]\n",
        "its hook returned NoneType where awq_core.api.ResidentLayout is wanted",
    ),
    "no hookimpl": (
        HEAD + "def awq_core_backends():\n    return []\n",
        "it has no hook: mark its functions with awq_core.api.hookimpl",
    ),
    "no API": (
        offers('backend("x")').replace("PLUGIN_API = 1", ""),
        "it does not say PLUGIN_API = 1, the plugin API that it is written for",
    ),
    "old API": (
        offers('backend("x")').replace("PLUGIN_API = 1", "PLUGIN_API = 0"),
        "it is written for plugin API 0, and this awq-core has API 1: install a version of the plugin for this one",
    ),
    "API as text": (
        offers('backend("x")').replace("PLUGIN_API = 1", 'PLUGIN_API = "1"'),
        "it is written for plugin API '1'",
    ),
    "no kernels": (offers('Backend("x", ())'), "backend 'x' has no kernels"),
    "twice the same": (offers('backend("x")', 'backend("x")'), "it offers two things called 'x'"),
    "two layouts of a name": (
        offers('backend("x", layouts=(layout("t"), layout("t")))'),
        "it offers two things called 'layout:t'",
    ),
    "reads nothing known": (offers('backend("x", reads="t")'), "kernel x.k reads layout 't', which nobody offers"),
    "cannot read what it takes": (
        offers('backend("x", reads="gemv")'),
        "kernel x.k reads layout 'gemv' as it is stored, so each of its records must say layouts={'gemv'}",
    ),
    "a built-in layout": (
        offers('backend("x", layouts=(layout("gemm"),))'),
        "layout 'gemm' of awq-odd is offered by awq-core",
    ),
    "a built-in backend": (offers('backend("reference")'), "backend 'reference' of awq-odd is offered by awq-core"),
    "string for a set": (
        offers('Backend("x", (Kernel("k", "*", (box(layouts="gemm"),), run),))'),
        "ValueError: Capability.lay",
    ),
    "no apply": (
        offers('Backend("x", (Kernel("k", "*", (box(),), None),))'),
        "ValueError: Kernel 'k': apply must be a fun",
    ),
    "list of kernels": (
        offers('Backend("x", [Kernel("k", "*", (box(),), run)])'),
        "ValueError: Backend 'x': kernels must",
    ),
    "upper case": (offers('backend("Odd")'), "ValueError: Backend.name must be a name of a-z, 0-9, _ and -, not 'Odd'"),
    "unhashable probe": (
        offers('backend("x", probe=type("P", (), {"__call__": run, "__hash__": None})())'),
        "TypeError: unhashable type: 'P'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_recorded_and_the_others_load(env, case, monkeypatch):
    source, error = BROKEN[case]
    env.install("before", offers('backend("before")'))
    env.install("odd", source)
    env.install("zlast", offers('backend("zlast")'))
    found = env.load()
    assert list(found.backends) == [*BUILT_IN, "before", "zlast"]
    assert list(errors(found)) == ["odd (awq-odd 1.0)"]
    text = errors(found)["odd (awq-odd 1.0)"]
    assert text.startswith(error)
    assert "\n" not in text

    with pytest.raises(PluginError) as caught:
        found.backend("odd")
    assert str(caught.value) == f"backend 'odd' of odd (awq-odd 1.0) could not be loaded: {text}"
    with pytest.raises(PluginError, match=r"installed are before, reference, zlast; these plugins failed to load: odd"):
        found.backend("neither")

    monkeypatch.setattr(plugins, "registry", lambda: found)
    assert select(SPEC).bands[0].candidate.name == "before.k"
    with pytest.raises(PluginError, match="backend 'odd' of odd"):
        select(SPEC, Request("odd", "AWQ_CORE_BACKEND=odd"))


def test_a_keyboard_interrupt_is_the_users(env):
    env.install("odd", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        env.load()


def test_a_backend_whose_plugin_is_called_otherwise_is_found_among_the_failures(env):
    env.install("pack", offers('backend("fast", reads="t")', 'backend("small")'))
    with pytest.raises(
        PluginError, match=r"backend 'fast' of pack \(awq-pack 1.0\) could not be loaded: kernel fast.k"
    ):
        env.load().backend("fast")


def test_a_name_taken_twice_goes_to_the_first_party(env):
    env.install("aaa", offers('backend("cpu")'), "aaa-kernels")
    env.install("cpu", offers('backend("cpu")'), OURS, "0.9")
    found = env.load()
    assert found.sources["cpu"].distribution == OURS
    assert errors(found) == {
        "aaa (aaa-kernels 1.0)": "backend 'cpu' of aaa-kernels is offered by awq-core already: "
        "uninstall one of the two distributions"
    }


def test_of_two_third_parties_the_first_by_name_wins_in_any_order(env):
    env.install("same", offers('backend("same")'), "zeta")
    env.install("same", offers('backend("same")'), "alpha")
    for points in (env.points, env.points[::-1]):
        found = load(points)
        assert found.sources["same"].distribution == "alpha"
        (error,) = errors(found).values()
        assert error.startswith("backend 'same' of zeta is offered by alpha already")


def test_layouts_may_come_from_a_plugin_that_loads_later(env):
    env.install("acme", offers('backend("acme", reads="tiles")'))
    env.install("zeta", HEAD + "@hookimpl\ndef awq_core_layouts():\n    return [layout('tiles')]\n")
    found = env.load()
    assert found.failures == ()
    assert found.sources["layout:tiles"].distribution == "awq-zeta"
    assert found.backends["acme"].kernels[0].reads == "tiles"


def test_a_dropped_plugin_takes_its_layouts_along(env):
    env.install("acme", offers('backend("acme", reads="tiles")'))
    env.install("zeta", offers('backend("zeta", reads="nowhere", layouts=(layout("tiles"),))'))
    found = env.load()
    assert (list(found.backends), "tiles" in found.layouts) == (BUILT_IN, False)
    assert [text.split(",")[0] for text in errors(found).values()] == [
        "kernel zeta.k reads layout 'nowhere'",
        "kernel acme.k reads layout 'tiles'",
    ]


def test_one_layout_record_may_be_offered_twice(env):
    shared = HEAD + "T = layout('tiles')\n\n@hookimpl\ndef awq_core_layouts():\n    return [T]\n\n"
    shared += (
        "@hookimpl\ndef awq_core_backends():\n    return [backend(n, reads='tiles', layouts=(T,)) for n in 'ab']\n"
    )
    module = env.install("first", shared)
    env.install(
        "second",
        f"from {module} import T, backend, hookimpl\nPLUGIN_API = 1\n\n@hookimpl\n"
        "def awq_core_backends():\n    return [backend('c', reads='tiles', layouts=(T,))]\n",
    )
    found = env.load()
    assert errors(found) == {}
    assert list(found.backends) == [*BUILT_IN, "a", "b", "c"]
    assert found.sources["layout:tiles"].name == "first"


def test_a_third_party_outranks_by_priority(env, monkeypatch):
    env.install("cpu", offers('backend("cpu", 290)'), OURS)
    env.install("acme", offers('backend("acme", 1000)'))
    found = env.load()
    monkeypatch.setattr(plugins, "registry", lambda: found)
    assert [c.name for c in select(SPEC).decision.accepted] == ["acme.k", "cpu.k", "reference.dequantize"]
    assert select(SPEC, Request("cpu", "version")).decision.chosen.name == "cpu.k"


@pytest.mark.parametrize(
    ("allow", "names"),
    [(None, ["acme", "beta"]), ("", []), (" ", []), ("beta", ["beta"]), (" beta , acme,", ["acme", "beta"]), ("x", [])],
)
def test_the_allow_list(env, allow, names):
    env.install("cpu", offers('backend("cpu")'), OURS)
    modules = {name: env.install(name, offers(f'backend("{name}")')) for name in ("acme", "beta")}
    found = env.load(allow)
    assert list(found.backends) == [*BUILT_IN, "cpu", *names]
    assert [source.name for source in found.left_out] == [name for name in modules if name not in names]
    for name, module in modules.items():
        assert (module in sys.modules) == (name in names)
        if name not in names:
            with pytest.raises(PluginError, match=rf"backend '{name}' of .* AWQ_CORE_PLUGINS does not name it: add it"):
                found.backend(name)


def maps(*types):
    """The source of a plugin that offers a fusing mapping for each model type."""
    mappings = ", ".join(f"FusingMapping(({name!r},), mlp=())" for name in types)
    head = HEAD + "from awq_core.api import FusingMapping\n\n@hookimpl\ndef awq_core_fusers():\n"
    return f"{head}    return [{mappings}]\n"


def test_fusers_have_a_group_of_their_own(env):
    both = maps("acme_lm") + "\n@hookimpl\ndef awq_core_backends():\n    return [backend('acme')]\n"
    env.install("acme", both)
    assert env.load().fusers == ()
    env.install("acme", both, "awq-acme-fusers", group=GROUPS[1])
    env.install("odd", "1 / 0", group=GROUPS[1])
    found = env.load()
    assert [mapping.model_types for mapping in found.fusers] == [("acme_lm",)]
    assert str(found.sources["model type:acme_lm"]) == "acme (awq-acme-fusers 1.0)"
    assert list(found.backends) == [*BUILT_IN, "acme"]
    assert errors(found) == {"odd (awq-odd 1.0)": "ZeroDivisionError: division by zero"}
    with pytest.raises(PluginError, match="backend 'odd' is not installed"):
        found.backend("odd")


def test_wrong_fusers_are_left_out(env):
    env.install("ours", maps("llama"), OURS, group=GROUPS[1])
    env.install("acme", maps("acme_lm", "llama"), group=GROUPS[1])
    env.install("late", maps("acme_lm"), group=GROUPS[1])
    env.install("odd", maps("").replace("('',)", "'llama'"), group=GROUPS[1])
    env.install("text", maps("x").replace("FusingMapping(('x',), mlp=())", "'a fuser'"), group=GROUPS[1])
    env.install("twice", maps("new", "new"), group=GROUPS[1])
    found = env.load()
    assert [mapping.model_types for mapping in found.fusers] == [("llama",), ("acme_lm",)]
    assert found.sources["model type:acme_lm"].name == "late"
    assert {name.split()[0]: error for name, error in errors(found).items()} == {
        "acme": "a fusing mapping of model type 'llama' is offered by awq-core already: leave it out",
        "odd": "ValueError: FusingMapping.model_types must be a tuple of names, not 'llama'",
        "text": "its hook returned str where awq_core.api.FusingMapping is wanted",
        "twice": "it offers two things called 'model type:new'",
    }


def test_a_distribution_without_metadata_still_loads(env):
    env.install("acme", offers('backend("acme")'), dist="")
    env.install("acme", offers('backend("other")'), dist="")
    found = env.load()
    assert sorted(found.backends) == ["acme", "other", "reference"]
    assert str(found.sources["acme"]).startswith("acme (unknown distribution")


def test_an_entry_point_without_a_distribution(env):
    module = env.install("acme", offers('backend("acme")'))
    bare = importlib.metadata.EntryPoint("acme", module, GROUPS[0])
    assert load([bare]).sources["acme"].distribution == "unknown distribution"


# Probes


def test_the_probe_is_asked_once_a_device(env, monkeypatch):
    source = offers('backend("acme", probe=probe, reads="t", layouts=(layout("t"),))')
    module = env.install(
        "acme", source.replace("def run", "asked = []\n\n\ndef probe(d):\n    asked.append(str(d))\n\n\ndef run")
    )
    found = env.load()
    monkeypatch.setattr(plugins, "registry", lambda: found)
    assert select(SPEC, imagined=True).bands[0].candidate.name == "acme.k"
    assert sys.modules[module].asked == []
    for _ in range(3):
        assert [band.candidate.name for band in select(SPEC).bands] == ["acme.k"]
    assert sys.modules[module].asked == ["cuda:sm90"]


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("raise OSError('no\\ndriver')", "OSError: no driver"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return 'triton is not installed: pip install triton'", "triton is not installed: pip install triton"),
        ("return False", "its probe answered False where a text or None is wanted"),
    ],
)
def test_a_probe_that_fails_is_a_refusal(env, monkeypatch, body, got):
    env.install("acme", HEAD + f"def probe(d):\n    {body}\n\n" + offers('backend("acme", probe=probe)')[len(HEAD) :])
    found = env.load()
    monkeypatch.setattr(plugins, "registry", lambda: found)
    plan = select(SPEC)
    assert plan.decision.chosen.name == "reference.dequantize"
    (refusal,) = plan.decision.refused
    assert str(refusal.reasons[0]) == f"available: wants backend acme to run here, got {got}"
    with pytest.raises(NoKernelError) as caught:
        select(SPEC, Request("acme", "AWQ_CORE_BACKEND=acme"))
    assert got in str(caught.value)


# Selection


def test_stored_weights_are_read_as_they_are(env, monkeypatch):
    env.install("acme", offers('backend("acme", 290, "t", (layout("t"),))', 'backend("plain", 250, "gemm")'))
    found = env.load()
    monkeypatch.setattr(plugins, "registry", lambda: found)
    assert select(SPEC).resident.name == "t"
    assert select(SPEC, stored=True).resident.name == "gemm"
    assert select(SPEC, stored=True).decision.chosen.name == "plain.k"
    with pytest.raises(NoKernelError, match="asks for backend acme, which refuses"):
        select(SPEC, Request("acme", "AwqConfig(version='acme')"), stored=True)


def test_names_that_nobody_has_are_told(env, monkeypatch, caplog):
    env.install("acme", offers('backend("acme")'))
    found = env.load()
    monkeypatch.setattr(plugins, "registry", lambda: found)
    notice.tell.cache_clear()
    request = Request(preferred=("acmee", "acme"), disabled=frozenset({"acme.kk", "reference.dequantize"}))
    for _ in range(2):
        assert select(SPEC, request).decision.chosen.name == "acme.k"
    assert [record.getMessage() for record in caplog.records] == [
        "prefer() names 'acmee', which is not installed; installed are acme, reference",
        "AWQ_CORE_DISABLE names 'acme.kk', which is not installed; installed are acme, reference",
    ]
