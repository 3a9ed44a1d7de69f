"""Buffers that a thread keeps: fresh pages for every call would cost as much as the arithmetic."""

from __future__ import annotations

import math
import threading

import torch


class _Held(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_held = _Held()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The thread's buffer ``name`` as an uninitialised tensor of ``shape``; the next call by that name overwrites it.

    It grows to the largest shape asked for and is freed when the thread ends.
    """
    numel = math.prod(shape)
    buffer = _held.buffers.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        # A tensor made in inference mode could not be written to outside of it later.
        with torch.inference_mode(False):
            buffer = torch.empty(numel, dtype=dtype)
        _held.buffers[name, dtype] = buffer
    return buffer[:numel].view(shape)
