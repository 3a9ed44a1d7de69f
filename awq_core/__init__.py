"""awq-core: run and make AWQ 4-bit language models on transformers 5, with kernels as plugins.

``awq_core.enable()`` (or ``import awq_core.auto``) makes ``from_pretrained`` load AWQ checkpoints. Importing
``awq_core`` alone imports no torch and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import AwqError, CheckpointError, ConfigError, LayoutError, NoKernelError, PluginError
from .request import prefer

if TYPE_CHECKING:
    from .hf.config import AwqConfig
    from .hf.enable import disable, enable
    from .linear import AwqLinear

_LAZY = {
    "AwqConfig": "awq_core.hf.config",
    "AwqLinear": "awq_core.linear",
    "disable": "awq_core.hf.enable",
    "enable": "awq_core.hf.enable",
}

__all__ = [
    "AwqConfig",
    "AwqError",
    "AwqLinear",
    "CheckpointError",
    "ConfigError",
    "LayoutError",
    "NoKernelError",
    "PluginError",
    "__version__",
    "disable",
    "enable",
    "prefer",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
