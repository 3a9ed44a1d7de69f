"""What this package registers: the mappings of the architectures that it knows."""

from __future__ import annotations

from collections.abc import Sequence

from awq_core.api import FusingMapping, hookimpl

from .mapping import MAPPINGS

PLUGIN_API = 1


@hookimpl
def awq_core_fusers() -> Sequence[FusingMapping]:
    """The built-in mappings."""
    return MAPPINGS
