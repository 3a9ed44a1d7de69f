"""The hooks of a plugin: registration only, none on the hot path.

A distribution names its module under the entry-point group ``awq_core.backends`` (or ``awq_core.fusers``)::

    [project.entry-points."awq_core.backends"]
    acme = "awq_acme.plugin"

and the module implements what it needs::

    from awq_core.api import Backend, hookimpl

    PLUGIN_API = 1

    @hookimpl
    def awq_core_backends():
        return [Backend(name="acme", kernels=(...), layouts=(...))]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .fusing import FusingMapping
    from .kernel import Backend, ResidentLayout

PROJECT = "awq_core"
PLUGIN_API = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def awq_core_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Kernel families of this plugin."""


@hookspec
def awq_core_layouts() -> Iterable[ResidentLayout]:  # type: ignore[empty-body]
    """Resident layouts that kernels of several backends may read."""


@hookspec
def awq_core_fusers() -> Iterable[FusingMapping]:  # type: ignore[empty-body]
    """Fusing mappings: where the projections of an architecture lie, for ``do_fuse=True``."""
