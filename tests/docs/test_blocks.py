"""What the README and the documents show is run: Python blocks on a tiny model, command lines through their parsers.

The blocks of a page are one session. Hub names become a tiny checkpoint, GPUs the CPU, ``exllama`` (which wants a GPU)
``reference``; ``my-model`` is a dense model in the current folder. A block below ``<!-- not run: why -->`` is left out.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import transformers
import typer

import awq_core
from awq_core.cli import app

ROOT = Path(__file__).parents[2]
MADE = ("docs/matrix.md", "docs/plans.md", "docs/reference/cli.md")
PAGES = [
    page
    for page in (
        *("README.md", "CONTRIBUTING.md", "backends/README.md", "fusers/README.md"),
        *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")),
    )
    if page not in MADE
]
BLOCK = re.compile(
    r"(?P<note><!-- not run: [^>]+ -->\n+)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
SUBSTITUTES = {
    '"cuda:0"': '"cpu"',
    '"cuda"': '"cpu"',
    ".to(0)": '.to("cpu")',
    'version="exllama"': 'version="reference"',
    '"num_attention_heads": 56': '"num_attention_heads": 4',  # sizes that have to be the model's
    '"num_key_value_heads": 8': '"num_key_value_heads": 2',
    '"hidden_size": 7168': '"hidden_size": 64',
}


def blocks(page: str, *kinds: str) -> list[str]:
    """The blocks of a page in these languages that are to be run."""
    found = BLOCK.finditer((ROOT / page).read_text("utf-8"))
    return [match["code"] for match in found if match["kind"] in kinds and not match["note"]]


WITH_PYTHON = [page for page in PAGES if blocks(page, "py", "python")]


@pytest.fixture
def session(models_with_tokenizer, tmp_path, monkeypatch):
    """``session(code)`` runs a block in the names that earlier blocks left; transformers is as it was afterwards."""
    dense, quantized = models_with_tokenizer
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "awq_core.auto", raising=False)  # so that importing it enables anew
    shutil.copytree(dense, "my-model")
    Path("calibration.txt").write_text("How to make a cake . " * 400)
    transformers.utils.logging.disable_progress_bar()
    names: dict = {}

    def run(code: str, page: str) -> None:
        code = re.sub(r'"TheBloke/[\w.-]+"', repr(str(quantized)), code)
        for old, new in SUBSTITUTES.items():
            code = code.replace(old, new)
        exec(compile(code, page, "exec"), names)

    yield run
    awq_core.disable()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft with transformers 5.23
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page, session):
    for code in blocks(page, "py", "python"):
        session(code, page)


def test_the_pages_that_matter_have_blocks():
    assert {"README.md", "docs/quickstart.md", "docs/guide.md", "docs/migrating.md"} <= set(WITH_PYTHON)


def command_lines(page: str) -> list[str]:
    """Every ``awq ...`` of a page's shell blocks and sessions."""
    lines = [line.removeprefix("$ ") for code in blocks(page, "bash", "console") for line in code.splitlines()]
    return [line for line in lines if re.match(r"(\.venv/bin/)?awq ", line)]


def parse(line: str) -> None:
    """Raise where the command or one of its options does not exist."""
    group = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    if words != ["--help"]:
        group.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)])
def test_command_lines_are_understood(page):
    for line in command_lines(page):
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{page}: {line}: {getattr(error, 'message', '') or repr(error)}")


def test_a_command_line_that_is_wrong_is_seen():
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse("awq explain PATH --vendor amd")
    with pytest.raises(KeyError):
        parse("awq explian PATH")


def source_text() -> str:
    """All strings of the packages, those that are continued on the next line joined."""
    files = [file for folder in ("awq_core", "backends", "fusers") for file in (ROOT / folder).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text("utf-8") for file in files))


def test_troubleshooting_names_real_messages():
    source = source_text()
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    titles = re.findall(r"^### `+ ?(.*?) ?`+$", text, re.MULTILINE)
    assert len(titles) > 20
    theirs = (
        "awq: command not found",
        "Loading an AWQ quantized model requires gptqmodel",
        "You passed quantization_config or equivalent",
    )
    pieces = [piece.strip() for title in titles if not title.startswith(theirs) for piece in title.split("…")]
    assert [piece for piece in pieces if piece not in source] == []


def named_files(text: str) -> set[str]:
    """The files and folders of the repository that a page names in its text, those with a NAME to fill in left out."""
    found = re.findall(r"`((?:\.github|awq_core|backends|benchmarks|docs|fusers|tests)/[\w./-]*)`", text)
    return {name for name in found if "NAME" not in name}


def test_files_that_are_named_exist():
    theirs = "docs/writing-a-backend.md"  # it names the files of the author's own distribution
    pages = [*(page for page in PAGES if page != theirs), "SECURITY.md", "CHANGELOG.md"]
    named = {(page, file) for page in pages for file in named_files((ROOT / page).read_text("utf-8"))}
    assert len(named) > 20
    assert [(page, file) for page, file in sorted(named) if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "backends/README.md"])
def test_links_lead_somewhere(page):
    """Those of the site are checked when it is built."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text("utf-8"))
    places = [link for link in links if "://" not in link]
    assert [link for link in places if not ((ROOT / page).parent / link).exists()] == []
