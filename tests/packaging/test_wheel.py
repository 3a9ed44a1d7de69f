"""The wheel holds our import packages, whole, and nothing else."""

from __future__ import annotations

import configparser
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The wheel's files, by name, as text."""
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def metadata(wheel: dict[str, str], file: str) -> str:
    return next(text for name, text in wheel.items() if name.endswith(f".dist-info/{file}"))


def test_holds_each_package_whole_and_nothing_else(wheel: dict[str, str]) -> None:
    expected = {
        file.relative_to((ROOT / package).parent).as_posix()
        for package in WHEEL["packages"]
        for file in (ROOT / package).rglob("*.py")
    }
    found = {name for name in wheel if name.endswith(".py")}
    assert found == expected
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.startswith("awq_")} == set()
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        Path(package).name for package in WHEEL["packages"]
    }


def test_every_plugin_in_the_tree_is_listed() -> None:
    in_tree = {
        file.parent.relative_to(ROOT).as_posix()
        for folder in ("backends", "fusers")
        for file in (ROOT / folder).rglob("awq_*/plugin.py")
    }
    assert in_tree <= set(WHEEL["packages"])
    assert set(WHEEL["dev-mode-dirs"]) == {Path(package).parent.as_posix() for package in WHEEL["packages"]}


def test_is_typed_and_licensed(wheel: dict[str, str]) -> None:
    assert "awq_core/py.typed" in wheel
    assert "Apache License" in metadata(wheel, "licenses/LICENSE")
    assert "License-Expression: Apache-2.0" in metadata(wheel, "METADATA")


def test_entry_points(wheel: dict[str, str]) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(metadata(wheel, "entry_points.txt"))
    assert entries["awq_core.backends"]["cpu"] == "awq_cpu.plugin"
    assert entries["console_scripts"]["awq"] == "awq_core.__main__:main"


def test_entry_points_name_files_of_the_wheel(wheel: dict[str, str]) -> None:
    entries = configparser.ConfigParser()
    entries.read_string(metadata(wheel, "entry_points.txt"))
    for section in entries.sections():
        for target in entries[section].values():
            path = target.split(":")[0].replace(".", "/")
            assert {f"{path}.py", f"{path}/__init__.py"} & set(wheel), f"{section}: {target} is not in the wheel"
