"""Who may import whom, and what the light modules cost to import.

A room is a module or package directly under ``awq_core``. Imports under ``TYPE_CHECKING`` are free: nothing happens at
run time. Imports inside functions count like the others.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FACE = ""  # awq_core/__init__.py, and names imported from it
WORDS = {"_version", "errors", "guard", "lazy", "notice", "spec"}  # every room may use these
BINDING = {"dispatch", "explain", "kernel", "layouts", "plugins", "request", "resident", "selection"}

MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "lazy": set(),
    "notice": set(),
    "guard": set(),
    "spec": {"errors", "guard"},
    "capability": set(),
    "fusing": set(),
    "tuning": set(),
    "fragments": {"layouts"},
    "words": {"kernel", "layouts"},
    "layouts": set(),
    "config": set(),
    "options": {"config"},
    "headers": {"layouts"},
    "kernel": {"capability"},
    "hookspecs": {"fusing", "kernel"},
    "request": {"config"},
    "api": {"capability", "fusing", "hookspecs", "kernel", "layouts", "tuning"},
    "resident": {"kernel", "layouts"},
    "reference": {"api", "capability", "kernel", "layouts"},
    "dispatch": {"capability", "explain", "kernel", "request"},
    "explain": {"capability", "dispatch", "kernel", "request", "resident"},
    "plugins": {"api", "fusing", "hookspecs", "kernel", "layouts", "reference", "resident"},
    "selection": {"capability", "dispatch", "explain", "kernel", "plugins", "reference", "request"},
    "ops": BINDING,
    "packed": BINDING | {"ops", "tuning"},
    "linear": BINDING | {"ops", "packed"},
    "experts": BINDING | {"ops", "packed"},
    "checkpoint": {"config", "headers", "layouts"},
    "quantization": {"checkpoint", "config", "experts", "headers", "layouts", "linear"},
    "evaluation": set(),
}
CORE = set(MAY_IMPORT)
MAY_IMPORT |= {
    "testing": CORE | {"hf"},
    "hf": CORE,
    "auto": {"hf"},
    "bench": CORE | {"hf"},
    "cli": CORE | {"bench", "hf", "testing", FACE},
    "__main__": {"cli"},
    FACE: {"request"},  # the rest it names in strings and imports on first use
}
LAZY_ROOMS = {FACE, "cli", "__main__"}  # these import nothing heavy at their top level
HEAVY = {"torch", "transformers", "triton"}
PLUGIN_MAY_IMPORT = {
    "backends": {"api", "fragments", "words"},
    "fusers": {"api", "errors", "fragments", "hf", "linear", "notice", "options", "plugins"},
}


class Import(NamedTuple):
    """One absolute dotted name that a file imports."""

    line: int
    name: str
    top_level: bool


def imports(module: str, is_package: bool, source: str) -> Iterator[Import]:
    """All imports of a module with this dotted name, relative ones resolved, those under TYPE_CHECKING left out."""

    def visit(nodes: list[ast.stmt] | list[ast.AST], top_level: bool) -> Iterator[Import]:
        for node in nodes:
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                yield from visit(node.orelse, top_level)
            elif isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name, top_level) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                up = node.level - is_package
                package = module.split(".")[: -up or None] if node.level else []
                base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
                yield from (Import(node.lineno, f"{base}.{alias.name}", top_level) for alias in node.names)
            else:
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(list(ast.iter_child_nodes(node)), top_level and not inside)

    return visit(ast.parse(source).body, True)


def room_of(name: str) -> str:
    """The room that a dotted name under awq_core lies in; names that are no room come from the public face."""
    first = name.split(".")[1] if "." in name else FACE
    return first if first in MAY_IMPORT else FACE


def violations(path: str, source: str) -> list[str]:
    """What a file of the repository (``awq_core/...``, ``backends/cpu/awq_cpu/...``) imports against the contracts."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    dotted = parts[:-1] if is_package else parts
    if parts[0] == "awq_core":
        module = ".".join(dotted)
        room = dotted[1] if len(dotted) > 1 else FACE
        if room not in MAY_IMPORT:
            return [f"{path}: awq_core.{room} has no contract: give it a row in MAY_IMPORT"]
        allowed = MAY_IMPORT[room] | {room} | (WORDS if room not in WORDS else set())
    else:
        start = next(i for i, part in enumerate(dotted) if part.startswith("awq_"))
        module = ".".join(dotted[start:])
        room = dotted[start]
        allowed = PLUGIN_MAY_IMPORT[parts[0]]

    def wrong(found: Import) -> str | None:
        package = found.name.split(".")[0]
        if package == "transformers" and room not in ("hf", "testing"):
            return "only awq_core.hf and awq_core.testing import transformers"
        if package in HEAVY and found.top_level and room in LAZY_ROOMS:
            return f"{package} is heavy: import it inside the function that needs it"
        if package == "awq_core" and room_of(found.name) not in allowed:
            return f"may import only {', '.join(sorted(allowed)) or 'nothing'} of awq_core"
        if package == "awq_fusers" and module == "awq_core.hf.fusing":
            return None  # part of this distribution; what third parties add are mappings
        if package.startswith("awq_") and package not in ("awq_core", module.split(".")[0]):
            return "a plugin is reached through entry points, never imported"
        return None

    found = imports(module, is_package, source)
    return [f"{path}:{item.line}: imports {item.name}: {why}" for item in found if (why := wrong(item))]


def our_files() -> list[str]:
    """Every Python file that is installed, relative to the root."""
    files = [
        file
        for package in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        for file in (ROOT / package).rglob("*.py")
    ]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def test_contracts_hold() -> None:
    files = our_files()
    assert "awq_core/api.py" in files
    assert [line for file in files for line in violations(file, (ROOT / file).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("awq_core/spec.py", "from .capability import Reason"),
        ("awq_core/errors.py", "import awq_core.spec"),
        ("awq_core/layouts/gemm.py", "from ..linear import AwqLinear"),
        ("awq_core/layouts/__init__.py", "from .. import ops"),
        ("awq_core/dispatch.py", "def choose():\n    from . import plugins"),
        ("awq_core/kernel.py", "from awq_core import AwqLinear"),
        ("awq_core/quantization/search.py", "import transformers.models"),
        ("awq_core/linear.py", "class A:\n    def f(self):\n        from awq_cpu import plugin"),
        ("awq_core/cli/generate.py", "import torch"),
        ("awq_core/cli/generate.py", "try:\n    import torch.nn\nexcept ImportError:\n    pass"),
        ("awq_core/cli/generate.py", "def run():\n    from transformers import AutoTokenizer"),
        ("awq_core/nowhere.py", ""),
        ("backends/cpu/awq_cpu/plugin.py", "from awq_core.kernel import Kernel"),
        ("backends/cpu/awq_cpu/plugin.py", "import awq_core"),
        ("backends/cpu/awq_cpu/kernels/pack.py", "from awq_gemm import tiles"),
        ("backends/cpu/awq_cpu/kernels/pack.py", "def f():\n    import transformers"),
        ("fusers/awq_fusers/norm.py", "from awq_core.packed import PackedModule"),
        ("awq_core/hf/quantizer.py", "from awq_fusers import fuse"),
    ],
)
def test_a_breach_is_seen(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("awq_core/errors.py", "if TYPE_CHECKING:\n    from .dispatch import Decision"),
        ("awq_core/layouts/gemm.py", "from .base import Layout\nfrom ..errors import LayoutError\nimport torch"),
        ("awq_core/hf/quantizer.py", "import transformers\nfrom ..linear import AwqLinear\nfrom . import _compat"),
        ("awq_core/cli/generate.py", "def run():\n    import torch\n    from ..hf import load"),
        ("backends/cpu/awq_cpu/plugin.py", "from awq_core.api import Kernel\nfrom .pack import pack\nimport awq_cpu"),
        ("backends/cpu/awq_cpu/kernels/pack.py", "from awq_core import api\nfrom ..plugin import NAME\nimport torch"),
        ("fusers/awq_fusers/norm.py", "from awq_core.linear import AwqLinear"),
        ("awq_core/hf/fusing.py", "def f():\n    from awq_fusers import fuse"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_folders_of_plugins_and_tests_are_no_packages() -> None:
    folders = [ROOT / "backends", *(ROOT / "backends").glob("*/"), ROOT / "fusers", ROOT / "tests"]
    assert [str(folder) for folder in folders if (folder / "__init__.py").exists()] == []


PLUGINS = [
    module
    for group, entries in PYPROJECT["project"]["entry-points"].items()
    if group.startswith("awq_core.")
    for module in entries.values()
]


@pytest.mark.parametrize("module", ["awq_core", "awq_core.api", "awq_core.options", "awq_core.cli", *PLUGINS])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    roots = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["dev-mode-dirs"]
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in roots)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
