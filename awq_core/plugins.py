"""The plugin loader: one at a time, so that a broken plugin disturbs nothing and is never silently forgotten."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pluggy

from . import hookspecs
from .errors import PluginError
from .kernel import Backend, ResidentLayout
from .layouts import NAMES
from .reference import BACKEND as REFERENCE
from .resident import as_stored
from .spec import Device

GROUPS = ("awq_core.backends", "awq_core.fusers")
OURS = "awq-core"
ALLOW_LIST = "AWQ_CORE_PLUGINS"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a plugin comes from: the entry point's name and the distribution that declares it."""

    name: str
    group: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A plugin that could not be used, and why, in one sentence."""

    source: Source
    error: str


@dataclass(frozen=True, slots=True)
class Registry:
    """What the plugins of this environment offer. ``sources`` says where each backend and layout came from."""

    backends: Mapping[str, Backend]
    layouts: Mapping[str, ResidentLayout]
    fusers: tuple[Any, ...]
    sources: Mapping[str, Source]
    failures: tuple[LoadFailure, ...]

    def backend(self, name: str) -> Backend:
        """The backend of that name; PluginError says why it failed to load, or which ones exist."""
        if name in self.backends:
            return self.backends[name]
        for failure in self.failures:
            if failure.source.name == name:
                raise PluginError(f"backend {name!r} of {failure.source} could not be loaded: {failure.error}")
        raise PluginError(f"backend {name!r} is not installed; installed are {', '.join(sorted(self.backends))}")


@functools.cache
def registry() -> Registry:
    """The registry of this process, loaded once (``registry.cache_clear()`` loads it anew)."""
    return load(_entry_points(), os.environ.get(ALLOW_LIST))


def load(entry_points: Iterable[importlib.metadata.EntryPoint], allow: str | None = None) -> Registry:
    """Load plugins one by one. ``allow`` lists the names of third-party plugins that may load (None: all).

    First-party plugins come first and are always allowed, so that no third party can take their names.
    """
    allowed = None if allow is None else {name.strip() for name in allow.split(",") if name.strip()}
    backends: dict[str, Backend] = {REFERENCE.name: REFERENCE}
    layouts: dict[str, ResidentLayout] = {name: as_stored(name) for name in NAMES}
    core = Source("core", "", OURS, _version())
    sources: dict[str, Source] = {REFERENCE.name: core} | dict.fromkeys(map(_layout_key, layouts), core)
    fusers: list[Any] = []
    failures: list[LoadFailure] = []
    for entry_point in sorted(entry_points, key=_order):
        source = _source(entry_point)
        if source.distribution != OURS and allowed is not None and source.name not in allowed:
            continue
        try:
            offered = _register(entry_point)
            _check_names(offered, source, backends, layouts, sources)
        except (Exception, SystemExit) as error:  # a plugin may fail in any way, and must not take the others along
            failures.append(LoadFailure(source, _one_line(error)))
            continue
        for backend in offered.backends:
            backends[backend.name] = backend
            sources[backend.name] = source
        for layout in offered.layouts:
            layouts[layout.name] = layout
            sources[_layout_key(layout.name)] = source
        fusers += offered.fusers
    frozen = MappingProxyType
    return Registry(frozen(backends), frozen(layouts), tuple(fusers), frozen(sources), tuple(failures))


@functools.cache
def probe(backend: Backend, device: Device) -> str | None:
    """``backend.probe(device)``, asked once; a probe that raises counts as a refusal with its error."""
    try:
        return backend.probe(device)
    except Exception as error:  # the user gets the reason in the decision, not a traceback
        return _one_line(error)


@dataclass(frozen=True, slots=True)
class _Offer:
    backends: tuple[Backend, ...]
    layouts: tuple[ResidentLayout, ...]
    fusers: tuple[Any, ...]


def _register(entry_point: importlib.metadata.EntryPoint) -> _Offer:
    """Import one plugin and call its hooks, in a plugin manager of its own (one raising hook spoils a shared call)."""
    plugin = entry_point.load()
    wants = getattr(plugin, "PLUGIN_API", None)
    if wants != hookspecs.PLUGIN_API:
        raise PluginError(
            f"it is written for plugin API {wants}, and this awq-core has API {hookspecs.PLUGIN_API}: "
            "install a version of the plugin for this one"
        )
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, entry_point.name)
    manager.check_pending()
    if entry_point.group == "awq_core.fusers":
        return _Offer((), (), tuple(f for offer in manager.hook.awq_core_fusers() for f in offer))
    backends = tuple(b for offer in manager.hook.awq_core_backends() for b in offer)
    layouts = tuple(layout for offer in manager.hook.awq_core_layouts() for layout in offer)
    for thing, kind in [*((b, Backend) for b in backends), *((layout, ResidentLayout) for layout in layouts)]:
        if not isinstance(thing, kind):
            raise PluginError(f"its hook returned {type(thing).__name__} where awq_core.api.{kind.__name__} is wanted")
    layouts += tuple(layout for backend in backends for layout in backend.layouts)
    return _Offer(backends, layouts, ())


def _check_names(
    offer: _Offer,
    source: Source,
    backends: Mapping[str, Backend],
    layouts: Mapping[str, ResidentLayout],
    sources: Mapping[str, Source],
) -> None:
    for name, taken, key in [
        *((b.name, backends, b.name) for b in offer.backends),
        *((layout.name, layouts, _layout_key(layout.name)) for layout in offer.layouts),
    ]:
        if name in taken:
            kind = "backend" if taken is backends else "layout"
            raise PluginError(
                f"{kind} {name!r} of {source.distribution} is offered by {sources[key].distribution} already: "
                "uninstall one of the two distributions"
            )
    known = set(layouts) | {layout.name for layout in offer.layouts} | {"*"}
    for backend in offer.backends:
        for kernel in backend.kernels:
            if kernel.reads not in known:
                raise PluginError(
                    f"kernel {backend.name}.{kernel.name} reads layout {kernel.reads!r}, which nobody offers"
                )


def _layout_key(name: str) -> str:
    return f"layout:{name}"


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return [point for group in GROUPS for point in importlib.metadata.entry_points(group=group)]


def _order(entry_point: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
    source = _source(entry_point)
    return (source.distribution != OURS, source.name, source.distribution)


def _source(entry_point: importlib.metadata.EntryPoint) -> Source:
    distribution = entry_point.dist
    if distribution is None:
        return Source(entry_point.name, entry_point.group, "unknown distribution", "")
    return Source(entry_point.name, entry_point.group, distribution.name, distribution.version)


def _version() -> str:
    from ._version import __version__

    return __version__


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}"
