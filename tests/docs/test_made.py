"""What of the documents is made from the code is up to date; ``make docs`` brings it there."""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import pytest

import awq_core
from awq_core import api

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make():
    """The generator, loaded as ``python docs/make`` does."""
    folder = ROOT / "docs" / "make"
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("awq_core_docs_make", folder / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


@pytest.fixture(scope="module")
def made(make):
    return make.outputs()


def test_everything_is_up_to_date(make, made):
    assert make.stale(made) == [], "run make docs"


def test_the_reference_has_every_command(made):
    (page,) = (text for file, text in made.items() if file.name == "cli.md")
    assert re.findall("^## awq (.*)$", page, re.MULTILINE)[:3] == ["inspect", "explain", "backends"]
    assert "| `PATH` |" in page
    assert "`float16\\|bfloat16\\|float32`" in page


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("gemm", [f"k 0 n {n}" for n in (0, 2, 4, 6, 1, 3, 5, 7)]),
        ("gemv", [f"k {k} n 0" for k in range(8)]),
        ("gemv_fast", [f"k {k} n 0" for k in (0, 8, 16, 24)]),
    ],
)
def test_pictures_of_layouts_show_the_first_word(made, layout, words):
    (text,) = (text for file, text in made.items() if file.name == f"layout-{layout}.svg")
    assert re.findall(r">(k \d+ n \d+)<", text)[: len(words)] == words


def test_the_api_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    named = set(re.findall(r"^::: awq_core\.(?:api\.)?(\w+)$", page, re.MULTILINE))
    errors = {name for name in awq_core.__all__ if name.endswith("Error")}  # listed by their module
    apart = errors | {"__version__", "ANY_LAYOUT", "PLUGIN_API", "hookimpl"}
    assert set(awq_core.__all__) | set(api.__all__) <= named | apart


def test_the_architecture_names_every_room():
    spec = importlib.util.spec_from_file_location("awq_core_rooms", ROOT / "tests" / "unit" / "test_imports.py")
    table = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = table  # its NamedTuples look their module up
    spec.loader.exec_module(table)
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = set(table.MAY_IMPORT) - {table.FACE}
    assert {room for room in rooms if not re.search(f"`{re.escape(room)}/?`", page)} == set()


def test_pictures_need_nothing_from_elsewhere(made):
    for file, text in made.items():
        if file.suffix == ".svg":
            assert not re.search(r"(href|src|url)\s*[=(]['\"]?https?:", text), file


def test_a_change_is_seen(make, made):
    def more(changed: dict) -> set[str]:
        return set(make.stale(changed)) - set(make.stale(made))

    file = next(file for file in made if file.name == "cli.md")
    assert more({**made, file: made[file] + "more"}) == {"docs/reference/cli.md"}
    assert more({path: text for path, text in made.items() if path.name != "flow.svg"}) == {"docs/images/flow.svg"}


def test_sessions_are_the_same_on_every_machine(make, monkeypatch):
    from awq_core.cli import _device
    from awq_core.spec import Device

    consoles = importlib.import_module("consoles")
    text = (ROOT / "docs" / "choosing.md").read_text("utf-8")
    for here in ("cpu:avx2", "cpu:avx512"):
        monkeypatch.setattr(_device, "local_devices", lambda here=here: [Device.parse(here)])
        with tempfile.TemporaryDirectory() as folder, consoles.folder(Path(folder)):
            assert consoles.page(text) == text
