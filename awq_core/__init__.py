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
    from .hf.autoawq import AutoAWQForCausalLM
    from .hf.config import AwqConfig
    from .hf.enable import disable, enable
    from .hf.quantize import quantize
    from .linear import AwqLinear

_LAZY = {
    "AutoAWQForCausalLM": "awq_core.hf.autoawq",
    "AwqConfig": "awq_core.hf.config",
    "AwqLinear": "awq_core.linear",
    "disable": "awq_core.hf.enable",
    "enable": "awq_core.hf.enable",
    "quantize": "awq_core.hf.quantize",
}

__all__ = [
    "AutoAWQForCausalLM",
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
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
