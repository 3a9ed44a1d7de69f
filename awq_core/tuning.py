"""What ``awq tune`` has measured on a GPU of this machine: kept as JSON, looked up without waiting.

A kernel that can run in several ways offers ``tunables(spec, rows)``, each config a mapping of names to whole numbers,
and asks ``tuned(...)`` before it launches; None means that nothing was measured and its own default holds. One file a
device lies in the folder ``tuned`` of the cache: ``AWQ_CORE_CACHE`` where it is set, else the user's cache folder. What
was measured with another version of awq-core or Triton is not used. It is read once a process, when a weight is bound.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .notice import tell

if TYPE_CHECKING:
    import torch

    from .spec import LinearSpec

CACHE = "AWQ_CORE_CACHE"
MOST_WARMED = 256

Config = Mapping[str, int]
Key = tuple[str, int, int, int, str, int]  # kernel, K, N, g, dtype, the band's last M

_trial: tuple[str, Config | None] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """The best config of one kernel (``backend.kernel``) for one problem and the band of M that ends at ``rows``.

    An empty config is the kernel's default: nothing was faster. Times are microseconds of one call, at the band's last
    M that the plan gives to the kernel.
    """

    kernel: str
    in_features: int
    out_features: int
    group_size: int
    dtype: str
    rows: int
    config: dict[str, int]
    us: float
    default_us: float

    @property
    def key(self) -> Key:
        """By what it is looked up, and replaced when it is measured again."""
        return (self.kernel, self.in_features, self.out_features, self.group_size, self.dtype, self.rows)


def band(rows: int) -> int:
    """The last M of the band that M = ``rows`` lies in: 1, 2, 3-4, 5-8, 9-16 and so on."""
    return 1 << (rows - 1).bit_length()


def representatives(first: int, last: int | None, most: int = MOST_WARMED) -> list[int]:
    """The largest M up to ``most`` of each band of ``first`` to ``last``, and ``first``: they reach every config."""
    end = max(first, most if last is None else min(last, most))
    found = {first, end}
    step = band(first)
    while step <= end:
        found.add(step)
        step *= 2
    return sorted(found)


def tuned(kernel: str, spec: LinearSpec, rows: int, device: torch.device) -> Config | None:
    """The config that was measured best for ``kernel`` (``"backend.kernel"``) at M = ``rows``, or None."""
    if _trial is not None and _trial[0] == kernel:
        return _trial[1]
    if device.type != "cuda":
        return None
    table = _table(device.index)
    if not table:
        return None
    return table.get((kernel, spec.in_features, spec.out_features, spec.group_size, spec.dtype, band(rows)))


@contextlib.contextmanager
def trial(kernel: str, config: Config | None) -> Iterator[None]:
    """Inside the block ``tuned`` answers ``config`` for ``kernel`` (for measuring, in one thread)."""
    global _trial
    before, _trial = _trial, (kernel, config)
    try:
        yield
    finally:
        _trial = before


def cache_folder() -> Path:
    """The folder of awq-core's cache; it need not exist."""
    if named := os.environ.get(CACHE, "").strip():
        return Path(named).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "awq-core"


def path_for(device: str) -> Path:
    """The file of the device with this name (as its driver gives it)."""
    return cache_folder() / "tuned" / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def versions() -> dict[str, str]:
    """What a measurement holds for."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {"awq_core": __version__, "triton": triton}


def read(device: str) -> list[Measured]:
    """What was measured on ``device`` with these versions; one that cannot be read is told of, and counts as empty."""
    path = path_for(device)
    try:
        document = json.loads(path.read_text("utf-8"))
        if {name: document[name] for name in versions()} != versions():
            tell(f"{path} was measured with other versions and is not used: run `awq tune` again")
            return []
        return [_measured(entry) for entry in document["entries"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        tell(f"{path} cannot be used ({type(error).__name__}: {error}): remove it, or run `awq tune` again")
        return []


def write(device: str, found: Iterable[Measured]) -> Path:
    """Add to what is kept for ``device``, newer measurements of the same problem instead of older; the file's path."""
    kept = {entry.key: entry for entry in (*read(device), *found)}
    entries = [asdict(kept[key]) for key in sorted(kept)]
    text = json.dumps({"device": device, **versions(), "entries": entries}, indent=1)
    path = path_for(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _table.cache_clear()
    return path


def _measured(entry: dict[str, Any]) -> Measured:
    made = Measured(**entry)
    whole = all(isinstance(name, str) and type(value) is int for name, value in made.config.items())
    if not whole:
        raise ValueError(f"config {made.config!r} is not made of whole numbers")
    return made


@functools.cache
def _table(index: int | None) -> dict[Key, Config]:
    import torch

    return {entry.key: entry.config for entry in read(torch.cuda.get_device_name(index)) if entry.config}
