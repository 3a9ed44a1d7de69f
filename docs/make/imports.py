"""Who imports whom, drawn from the contracts that ``tests/unit/test_imports.py`` holds the code to."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from svg import COLOURS, LINE, SOFT, STRONG, Picture

ROOT = Path(__file__).parents[2]
CELL, LEFT, TOP = 20, 150, 150


def contracts() -> ModuleType:
    """The test module, which holds the table and the reader of imports."""
    file = ROOT / "tests" / "unit" / "test_imports.py"
    spec = importlib.util.spec_from_file_location("awq_core_contracts", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def picture() -> str:
    """A square for each pair: may import, and does import."""
    table = contracts()
    rooms = [room for room in table.MAY_IMPORT if room != table.FACE]
    does = {room: set[str]() for room in rooms}
    for file in table.our_files():
        parts = Path(file).with_suffix("").parts
        room = parts[1] if parts[0] == "awq_core" else ""
        if room in does:
            package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if package else parts)
            found = table.imports(module, package, (ROOT / file).read_text())
            does[room] |= {table.room_of(item.name) for item in found if item.name.startswith("awq_core.")}
    made = Picture(LEFT + len(rooms) * CELL + 30, TOP + len(rooms) * CELL + 60, "Who imports whom in awq_core")
    made.text(16, 26, "A row imports a column", 15, bold=True)
    for at, room in enumerate(rooms):
        x, y = LEFT + at * CELL, TOP + at * CELL
        made.text(LEFT - 8, y + 14, room, 12, anchor="end")
        made.parts.append(
            f"<text x='{x + 14}' y='{TOP - 8}' font-size='12' transform='rotate(-60 {x + 14} {TOP - 8})'>{room}</text>"
        )
        allowed = table.MAY_IMPORT[room] | (table.WORDS if room not in table.WORDS else set())
        for column, other in enumerate(rooms):
            fill = "#eef1f4" if other == room else STRONG[0] if other in does[room] else ""
            if fill or other in allowed:
                made.box(LEFT + column * CELL, y, CELL, CELL, fill or COLOURS[0], "none", 0)
    end = len(rooms) * CELL
    for at in range(len(rooms) + 1):
        made.path([(LEFT + at * CELL, TOP), (LEFT + at * CELL, TOP + end)], "#e4e7eb", 1)
        made.path([(LEFT, TOP + at * CELL), (LEFT + end, TOP + at * CELL)], "#e4e7eb", 1)
    y = made.height - 30
    for x, fill, text in ((LEFT, STRONG[0], "imports it"), (LEFT + 130, COLOURS[0], "may import it, and does not")):
        made.box(x, y, 14, 14, fill, LINE, 0)
        made.text(x + 20, y + 12, text, 12, SOFT)
    return str(made)
