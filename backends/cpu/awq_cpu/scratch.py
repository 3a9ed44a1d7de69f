"""Buffers that a thread keeps: fresh pages for every call would cost as much as the arithmetic."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

import torch

T = TypeVar("T")


class _Held(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self.views: dict[Hashable, object] = {}


_held = _Held()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The thread's buffer ``name`` as an uninitialised tensor of ``shape``; the next call by that name overwrites it.

    It grows to the largest shape asked for and is freed when the thread ends.
    """
    numel = math.prod(shape)
    buffer = _held.buffers.get((name, dtype))
    # A tensor made in inference mode could not be written to outside of it later; that holds for views as well.
    with torch.inference_mode(False):
        if buffer is None or buffer.numel() < numel:
            _held.views.clear()  # they would keep the old buffer alive
            _held.buffers[name, dtype] = buffer = torch.empty(numel, dtype=dtype)
        return buffer[:numel].view(shape)


def views(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` builds from this thread's buffers, made once for each ``key`` (until a buffer grows)."""
    found = _held.views.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = make()
        _held.views[key] = found
    return cast(T, found)
