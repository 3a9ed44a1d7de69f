"""What of the documents is made from the code: ``python docs/make`` writes it, ``--check`` says what is not up to date.

The command-line reference, the pictures, and the sessions inside the pages that are marked ``<!-- made -->``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import charts
import cli_reference
import consoles
import flow
import imports
import layouts

DOCS = Path(__file__).parents[1]


def outputs() -> dict[Path, str]:
    """Every file that is made, with its text."""
    pictures = {"imports.svg": imports.picture(), "flow.svg": flow.picture()} | layouts.pictures() | charts.pictures()
    made = {DOCS / "images" / name: text for name, text in pictures.items()}
    made[DOCS / "reference" / "cli.md"] = cli_reference.page()
    with tempfile.TemporaryDirectory() as temporary, consoles.folder(Path(temporary)):
        for file in [*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"]:
            text = file.read_text("utf-8")
            if consoles.MARKED.search(text):
                made[file] = consoles.page(text)
    return made


def stale(made: dict[Path, str]) -> list[str]:
    """The files that are not as they would be made, and pictures that nothing makes any more."""
    wrong = [file for file, text in made.items() if not file.is_file() or file.read_text("utf-8") != text]
    wrong += set((DOCS / "images").glob("*.svg")) - made.keys()
    return sorted(str(file.relative_to(DOCS.parent)) for file in wrong)


def main() -> None:
    """Write, or check."""
    made = outputs()
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(f"{file} is not up to date: run make docs" for file in stale(made)) or None)
    for file, text in made.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for file in stale(made):
        (DOCS.parent / file).unlink()
    print(f"{len(made)} documents and pictures are written")


if __name__ == "__main__":
    main()
