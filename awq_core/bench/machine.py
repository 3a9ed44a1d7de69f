"""The machine: which device, its memory, and the bandwidth that it reaches right now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from ..errors import ConfigError

COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
REPEATS = 9


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second: of reading a buffer, and of copying one (bytes read and written), medians."""

    read: float
    copy: float

    @property
    def best(self) -> float:
        """The larger one, which a floor is computed from."""
        return max(self.read, self.copy)


def pick_device(text: str | None) -> torch.device:
    """The device that ``text`` names; None is the first GPU, or the CPU. ConfigError if this machine lacks it."""
    if text is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"device {text!r} is not understood: write cpu, cuda or cuda:1") from None
    if device.type not in COPY_BYTES:
        raise ConfigError(f"device {text!r} cannot be measured: write cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device {text!r}: this machine has no such GPU")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device, as a user waits for it."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, or of the machine's."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total


def free_memory(device: torch.device) -> int:
    """Bytes that a new model may take."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


class PeakMemory:
    """The most memory that is in use between ``start()`` and ``bytes()``.

    On a GPU the peak of torch's allocations. On a CPU the resident size of this process when ``bytes()`` is called,
    models, Python and libraries together: a peak of the moment is not told by the system.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def bytes(self) -> int:
        """The peak since ``start()``."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return int(psutil.Process().memory_info().rss)


def measure_bandwidth(device: torch.device) -> Bandwidth:
    """Read and copy a buffer that no cache holds (1 GiB on a GPU, 256 MiB on a CPU)."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def middle(call: Callable[[], object]) -> float:
        return statistics.median([seconds(call, device) for _ in range(REPEATS + 2)][2:])

    return Bandwidth(size / middle(source.sum), 2 * size / middle(lambda: target.copy_(source)))
