"""Plugins in a process of their own: found on sys.path, switched by the environment, and what that costs to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

PLUGIN = """
from awq_core.api import Backend, Capability, Kernel, hookimpl

PLUGIN_API = {api}
BOX = Capability("cuda", frozenset({{"gemm"}}), frozenset({{"float16"}}), {priority})


def probe(device):
    raise AssertionError("an imagined device is not probed")


def run(weight, x, bias):
    import triton


@hookimpl
def awq_core_backends():
    return [Backend("{backend}", (Kernel("k", "*", (BOX,), run),), probe=probe)]
"""
REPORT = """
import json, sys
from awq_core import plugins
from awq_core.errors import AwqError
from awq_core.selection import select
from awq_core.spec import Device, LinearSpec

found = plugins.registry()
after_load = sorted({"torch", "triton", "transformers"} & set(sys.modules))
try:
    spec = LinearSpec(4096, 4096, 128, device=Device.parse("cuda:sm90"))
    plan = select(spec, imagined=True)
    chosen = plan.decision.chosen.name
except AwqError as error:
    chosen = f"{type(error).__name__}: {error}"
heavy = sorted({"torch", "triton", "transformers"} & set(sys.modules))
failures = {str(f.source): f.error for f in found.failures if f.source.distribution != "awq-core"}
outside = [name for name, source in found.sources.items() if source.distribution != "awq-core"]
print(json.dumps({"loaded": after_load, "heavy": heavy, "chosen": chosen, "failures": failures, "outside": outside}))
"""


@pytest.fixture
def run(tmp_path):
    """Install the distributions, then report what a fresh process sees."""

    def add(name, source):
        (tmp_path / f"awq_{name}.py").write_text(source)
        info = tmp_path / f"awq_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: awq-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[awq_core.backends]\n{name} = awq_{name}\n")

    add("acme", PLUGIN.format(api=1, priority=1000, backend="acme"))
    add("broken", "raise SystemExit('no compiler here')")
    add("old", PLUGIN.format(api=0, priority=2000, backend="old"))
    add("thief", PLUGIN.format(api=1, priority=3000, backend="reference"))

    def report(**variables):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("AWQ_CORE_")}
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(REPORT)],
            env=clean | variables | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return report


def test_an_imagined_gpu_costs_no_import_and_broken_plugins_disturb_nobody(run):
    seen = run()
    assert (seen["loaded"], seen["heavy"]) == ([], [])
    assert (seen["chosen"], seen["outside"]) == ("acme.k", ["acme"])
    assert seen["failures"] == {
        "broken (awq-broken 1.0)": "SystemExit: no compiler here",
        "old (awq-old 1.0)": "it is written for plugin API 0, and this awq-core has API 1: "
        "install a version of the plugin for this one",
        "thief (awq-thief 1.0)": "backend 'reference' of awq-thief is offered by awq-core already: "
        "uninstall one of the two distributions",
    }


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"AWQ_CORE_BACKEND": "Reference"}, "reference.dequantize"),
        ({"AWQ_CORE_BACKEND": "acme", "AWQ_CORE_DISABLE": "acme.k"}, "NoKernelError: AWQ_CORE_BACKEND=acme asks for"),
        (
            {"AWQ_CORE_BACKEND": "broken"},
            "PluginError: backend 'broken' of broken (awq-broken 1.0) could not be loaded: SystemExit: no compiler",
        ),
        (
            {"AWQ_CORE_BACKEND": "acme", "AWQ_CORE_PLUGINS": ""},
            "PluginError: backend 'acme' of acme (awq-acme 1.0) is installed, but AWQ_CORE_PLUGINS does not name it",
        ),
    ],
)
def test_the_environment(run, variables, chosen):
    seen = run(**variables)
    assert seen["chosen"].startswith(chosen)
    assert seen["heavy"] == []
    if "AWQ_CORE_PLUGINS" in variables:
        assert (seen["failures"], seen["outside"]) == ({}, [])
