"""Checkpoint layouts, one file each. ``version`` in a config is a claim about the layout; the file's header decides."""

from __future__ import annotations

import functools
import importlib

from ..errors import LayoutError
from .base import Codes, Layout, TensorSpec, dequantize

NAMES = ("gemm", "gemv", "gemv_fast", "llm_awq", "marlin")

__all__ = ["NAMES", "Codes", "Layout", "TensorSpec", "checkpoint_layout", "dequantize"]


@functools.cache
def checkpoint_layout(name: str) -> Layout:
    """The checkpoint layout called ``name``; LayoutError names those that exist."""
    if name not in NAMES:
        raise LayoutError(f"layout {name!r} does not exist: the checkpoint layouts are {', '.join(NAMES)}")
    layout: Layout = importlib.import_module(f".{name}", __name__).LAYOUT
    return layout
