"""What the user asked for, strongest first: ``AwqConfig(version=...)``, ``prefer()``, and the environment.

* ``AwqConfig(version="name")`` and ``AWQ_CORE_BACKEND=name`` force a backend: its refusal is an error.
* ``with prefer("name")`` ranks backends first without forbidding the others.
* ``AWQ_CORE_DISABLE=name,name.kernel`` takes backends or single kernels out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

_preferred: ContextVar[tuple[str, ...]] = ContextVar("awq_core_preferred", default=())


@dataclass(frozen=True, slots=True)
class Request:
    """The user's word on backends. ``source`` says where ``forced`` came from, for messages."""

    forced: str | None = None
    source: str = ""
    preferred: tuple[str, ...] = ()
    disabled: frozenset[str] = frozenset()


def current_request(version: str | None = None) -> Request:
    """The request in force now, for a model loaded with ``AwqConfig(version=version)`` (None: nothing was asked)."""
    environment = os.environ.get("AWQ_CORE_BACKEND", "").strip().lower() or None
    preferred = _preferred.get()
    source = ""
    forced = (version or "").strip().lower() or None
    if forced is not None:
        source = f'AwqConfig(version="{forced}")'
    elif environment is not None and not preferred:
        forced, source = environment, f"AWQ_CORE_BACKEND={environment}"
    disabled = (word.strip().lower() for word in os.environ.get("AWQ_CORE_DISABLE", "").split(","))
    return Request(forced, source, preferred, frozenset(word for word in disabled if word))


@contextlib.contextmanager
def prefer(*backends: str) -> Iterator[None]:
    """Rank these backends first, in this order, for every module that is bound inside the ``with`` block.

    A backend that refuses a module gives way to the next one; ``explain`` shows why.
    """
    token = _preferred.set(tuple(name.strip().lower() for name in backends))
    try:
        yield
    finally:
        _preferred.reset(token)
