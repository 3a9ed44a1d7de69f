"""Functions that are imported when they are first called, so that a plugin's module stays light."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def lazy(target: str) -> Callable[..., Any]:
    """The function at ``"package.module:name"``, imported at its first call."""
    module, _, name = target.partition(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function

    def call(*args: Any) -> Any:
        return load()(*args)

    return call
