"""Fused modules: ``fuse(model)`` joins the projections of attention and MLP blocks; ``unfuse(model)`` restores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .apply import fuse, unfuse
    from .record import FusedLayer, FusedRecord, Unfused

_LAZY = {"fuse": "apply", "unfuse": "apply", "FusedLayer": "record", "FusedRecord": "record", "Unfused": "record"}

__all__ = ["FusedLayer", "FusedRecord", "Unfused", "fuse", "unfuse"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
