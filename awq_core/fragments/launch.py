"""What the launchers of kernels on ``awq_fragments`` share: counters, and what of the hardware a kernel may use."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

COUNTERS = 1 << 14
CAPTURE = -1

_captures = threading.local()
_counters: dict[tuple[str, int | None, int], torch.Tensor] = {}


class Launch:
    """A kernel with its grid and constants: from the second launch on without Triton's look at every argument.

    Triton compiles a function anew for other types of its arguments, for whole numbers that are 1 or divisible by 16,
    and for pointers that are. Whoever keeps a ``Launch`` vouches for the numbers, and keeps one for each device;
    tensors are looked at here.
    """

    __slots__ = ("constants", "function", "grid", "kept", "options", "values")

    def __init__(
        self, function: Any, grid: tuple[int, ...], constants: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.function, self.constants, self.options = function, constants, options
        self.grid = (*grid, 1, 1)[:3]
        self.values = tuple(constants[name] for name in function.arg_names if name in constants)
        # Of the tensors, and what Triton has compiled for them, with its grid: one value, for threads.
        self.kept: tuple[list[torch.dtype], Any] = ([], None)

    def __call__(self, tensors: tuple[torch.Tensor, ...], *others: Any) -> None:
        """Launch with all arguments that are no constants, in order, tensors first, on the device where they lie."""
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # Triton compiles for the current device, and launches on its stream
                self(tensors, *others)
            return
        places = 0
        for tensor in tensors:
            places |= tensor.data_ptr()
        dtypes = [tensor.dtype for tensor in tensors]
        known, run = self.kept
        if places % 16 == 0 and dtypes == known:
            run(*tensors, *others, *self.values)
            return
        compiled = self.function[self.grid](*tensors, *others, **self.constants, **self.options)
        if places % 16 == 0 and not interpreted():
            self.kept = (dtypes, compiled[self.grid])


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def ptx() -> bool:
    """Whether kernels may hold PTX: not on AMD, and not in the interpreter."""
    return torch.version.hip is None and not interpreted()


@functools.cache
def joins(device: torch.device) -> bool:
    """Whether one product takes the codes of a whole group (sm90, whose operand order is that of the words)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of this GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels may begin before the one before them ends (programmatic dependent launch, from sm90 on)."""
    return ptx() and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that calls ``wait_for_inputs`` where ``overlaps`` says so."""
    return {"launch_pdl": True} if overlaps(device) else {}


@contextlib.contextmanager
def own_counters(device: torch.device) -> Iterator[torch.Tensor]:
    """Counters for what is captured inside, in this thread, alone: to be kept as long as the graph."""
    _captures.own = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    try:
        yield _captures.own
    finally:
        del _captures.own


def counters(device: torch.device) -> torch.Tensor:
    """Zeros in which the parts of a tile count themselves; every kernel leaves them at zero.

    One buffer a stream, since kernels of one stream follow each other, and one for graph captures, which must not
    allocate it themselves. So two graphs must not be replayed at the same time on two streams, unless they were
    captured under ``own_counters``.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    own: torch.Tensor | None = getattr(_captures, "own", None)
    if capturing and own is not None and own.device == device:
        return own
    stream = CAPTURE if capturing or device.type != "cuda" else torch.cuda.current_stream(device).cuda_stream
    found = _counters.get((device.type, device.index, stream))
    if found is None:
        found = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        if not capturing:
            _counters[device.type, device.index, stream] = found
            shared = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
            _counters.setdefault((device.type, device.index, CAPTURE), shared)
    return found
