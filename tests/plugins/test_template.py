"""From an empty folder to a forced dispatch: ``awq new-backend``, installed beside awq-core in a fresh environment.

The environment sees the packages of the one that runs the tests, so nothing is downloaded. Two more distributions are
installed there: one that is broken on import, and one that outranks the built-in kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

from awq_core.cli.new_backend import check_name, write
from awq_core.errors import ConfigError

ROOT = Path(__file__).parents[2]
NAME = "my-kernels"

FIXTURE = """
from awq_core.api import Backend, Capability, Kernel, hookimpl

PLUGIN_API = 1


def apply(weight, x, bias):
    return x @ weight.dequantize(x.dtype)


@hookimpl
def awq_core_backends():
    record = Capability("cpu", frozenset({"gemm"}), frozenset({"bfloat16"}), priority=1000)
    return [Backend("fast", (Kernel("dense", "gemm", (record,), apply),))]
"""

# What a user's program does: force the backend, load, look at the plan, generate.
FORCED = """
import sys, torch, awq_core.auto
from transformers import AutoModelForCausalLM, AwqConfig

config = AwqConfig(version=sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.bfloat16)
assert model(torch.arange(5)[None]).logits.isfinite().all()
linears = [module for module in model.modules() if isinstance(module, awq_core.AwqLinear)]
bound = {band.candidate.name for linear in linears for band in linear.weight_state.plan.bands}
print(len(linears), *sorted(bound))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(*arguments)``: the fresh environment's Python; returns what it prints."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = sysconfig.get_path("purelib", vars={"base": str(folder / "venv")})
    parents = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    lines = [f"import site; site.addsitedir({parent!r})" for parent in sorted(parents)]
    Path(site, "parent.pth").write_text("\n".join(lines))

    def run(*arguments: str | Path, cwd: Path | None = None) -> str:
        done = subprocess.run([python, *arguments], cwd=cwd or folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    return run


def awq(run, *arguments: str | Path) -> str:
    return run("-c", "from awq_core.cli import main; main()", *arguments)


def install(run, folder: Path) -> None:
    offline = ("--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation")
    run("-m", "pip", "install", "-q", *offline, folder)


def distribution(folder: Path, name: str, source: str) -> Path:
    """A distribution awq-NAME with one module, which is its plugin."""
    folder.mkdir()
    (folder / f"awq_{name}.py").write_text(source)
    project = f'[project]\nname = "awq-{name}"\nversion = "1.0"\n'
    project += f'[project.entry-points."awq_core.backends"]\n{name} = "awq_{name}"\n'
    project += '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    (folder / "pyproject.toml").write_text(project)
    return folder


@pytest.mark.slow
def test_from_an_empty_folder_to_a_forced_dispatch(run, tmp_path, checkpoint, record_property):
    start = time.monotonic()
    path = checkpoint()
    awq(run, "new-backend", NAME, "--dir", tmp_path / "plugin")
    install(run, tmp_path / "plugin")

    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path / "plugin").splitlines()[-1]
    assert " passed" in told
    assert "failed" not in told

    seen = json.loads(awq(run, "backends", "--json"))
    (mine,) = [backend for backend in seen["backends"] if backend["name"] == NAME]
    assert (mine["distribution"], [kernel["name"] for kernel in mine["kernels"]]) == (f"awq-{NAME}", ["torch", "gemv"])
    assert seen["failures"] == []

    def kernels(*options: str) -> set[str]:
        planned = json.loads(awq(run, "explain", path, "--device", "cpu", "--dtype", "bfloat16", "--json", *options))
        return {linear["bands"][0]["kernel"] for linear in planned["linears"]}

    assert kernels("--version", NAME) == {f"{NAME}.torch"}
    built_in = kernels()
    assert not any(kernel.startswith(NAME) for kernel in built_in)  # it does not push itself in front

    assert run("-c", FORCED, path, NAME).split() == ["14", f"{NAME}.torch"]
    seconds = time.monotonic() - start
    print(f"from an empty folder to a forced dispatch: {seconds:.0f} s, {told}")
    record_property("seconds", round(seconds))

    install(run, distribution(tmp_path / "broken", "broken", "import no_such_module\n"))
    install(run, distribution(tmp_path / "fast", "fast", FIXTURE))
    seen = json.loads(awq(run, "backends", "--json"))
    assert {"cpu", "reference", NAME, "fast"} <= {backend["name"] for backend in seen["backends"]}
    assert [(failure["name"], failure["error"]) for failure in seen["failures"]] == [
        ("broken", "ModuleNotFoundError: No module named 'no_such_module'")
    ]
    assert kernels() == {"fast.dense"}
    assert kernels("--version", NAME) == {f"{NAME}.torch"}

    run("-m", "pip", "uninstall", "-q", "-y", f"awq-{NAME}", "awq-fast", "awq-broken")
    seen = json.loads(awq(run, "backends", "--json"))
    assert not {NAME, "fast"} & {backend["name"] for backend in seen["backends"]}
    assert (seen["failures"], kernels()) == ([], built_in)


def test_the_template_is_in_the_wheel_as_it_is_in_the_tree(tmp_path):
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith("awq_core/template/")}
    template = ROOT / "awq_core" / "template"
    assert packed == {file.relative_to(ROOT).as_posix() for file in template.rglob("*.tmpl")}
    assert {"awq_core/template/.gitignore.tmpl", "awq_core/template/.github/workflows/ci.yml.tmpl"} <= packed


@pytest.mark.parametrize("name", ["acme", "4-bit", "a-rather-long-name-for_a-backend"])
def test_what_is_written_is_clean(tmp_path, name):
    pytest.importorskip("ruff")
    folder = write(name, tmp_path / "made" / "here")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    texts = [file.read_text() for file in folder.rglob("*") if file.is_file()]
    assert len(texts) == 10
    assert not [text for text in texts if "@NAME@" in text or "@MODULE@" in text or "@VERSION@" in text]
    assert [file.name for file in folder.parent.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Acme", "is not a name of a-z, 0-9, _ and - that begins and ends with a letter or a digit"),
        ("acme-", "is not a name of"),
        ("-acme", "is not a name of"),
        ("a/b", "is not a name of"),
        ("", "is not a name of"),
        ("cpu", "is taken by awq-core itself"),
        ("core", "is taken by awq-core itself"),
    ],
)
def test_names(name, why):
    with pytest.raises(ConfigError, match=why):
        check_name(name)


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="is not an empty folder: choose another with --dir"):
            write("acme", target)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert (write("acme", tmp_path / "empty") / "pyproject.toml").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write("acme", tmp_path / "acme")
    assert list(tmp_path.iterdir()) == []
