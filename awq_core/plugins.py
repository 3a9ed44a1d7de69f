"""The plugin loader: one at a time, so that a broken plugin disturbs nothing and is never silently forgotten."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pluggy

from . import hookspecs
from ._version import __version__
from .errors import PluginError
from .fusing import FusingMapping
from .guard import one_line
from .kernel import ANY_LAYOUT, Backend, ResidentLayout
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
    """A plugin that could not be used, and why, in one line; ``offered`` are its backends, as far as it got."""

    source: Source
    error: str
    offered: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Registry:
    """What the plugins of this environment offer. ``sources`` says where each backend, layout and mapping came from.

    ``left_out`` are plugins that AWQ_CORE_PLUGINS does not name; they were not imported.
    """

    backends: Mapping[str, Backend]
    layouts: Mapping[str, ResidentLayout]
    fusers: tuple[FusingMapping, ...]
    sources: Mapping[str, Source]
    failures: tuple[LoadFailure, ...]
    left_out: tuple[Source, ...] = ()

    def backend(self, name: str) -> Backend:
        """The backend of that name; PluginError says why it failed to load, or which ones exist."""
        if name in self.backends:
            return self.backends[name]
        for failure in self.failures:
            if name in failure.offered or (failure.source.name == name and failure.source.group == GROUPS[0]):
                raise PluginError(f"backend {name!r} of {failure.source} could not be loaded: {failure.error}")
        for source in self.left_out:
            if source.name == name and source.group == GROUPS[0]:
                raise PluginError(
                    f"backend {name!r} of {source} is installed, but {ALLOW_LIST} does not name it: add it"
                )
        raise PluginError(f"backend {name!r} is not installed; {self.known()}")

    def known(self) -> str:
        """The names that may be asked for and those that failed, as the end of a sentence."""
        failed = ", ".join(sorted(failure.source.name for failure in self.failures))
        text = f"installed are {', '.join(sorted(self.backends))}"
        return f"{text}; these plugins failed to load: {failed} (`awq backends` says why)" if failed else text


@functools.cache
def registry() -> Registry:
    """The registry of this process, loaded once (``registry.cache_clear()`` loads it anew)."""
    return load(_entry_points(), os.environ.get(ALLOW_LIST))


def load(entry_points: Iterable[importlib.metadata.EntryPoint], allow: str | None = None) -> Registry:
    """Load plugins one by one. ``allow`` lists the names of third-party plugins that may load (None: all).

    First-party plugins come first and are always allowed, so that no third party can take their names.
    """
    allowed = None if allow is None else {name.strip() for name in allow.split(",") if name.strip()}
    core = Source("core", "", OURS, __version__)
    offers = [_Offer(core, (REFERENCE,), tuple(map(as_stored, NAMES)), ())]
    failures: list[LoadFailure] = []
    left_out: list[Source] = []
    for source, entry_point in sorted(((_source(point), point) for point in entry_points), key=_order):
        if source.distribution != OURS and allowed is not None and source.name not in allowed:
            left_out.append(source)
            continue
        offered: tuple[str, ...] = ()
        try:
            offer = _register(source, entry_point)
            offered = tuple(backend.name for backend in offer.backends)
            _check_names(offer, offers)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin may fail in any way (SystemExit, a panic in Rust), and others go on
            failures.append(LoadFailure(source, _why(error), offered))
        else:
            offers.append(offer)
    while found := _unreadable(offers):  # one that is dropped takes its layouts along
        offer, why = found
        offers.remove(offer)
        failures.append(LoadFailure(offer.source, why, tuple(backend.name for backend in offer.backends)))
    backends = {backend.name: backend for offer in offers for backend in offer.backends}
    layouts = {layout.name: layout for offer in offers for layout in offer.layouts}
    sources = {key: offer.source for offer in reversed(offers) for key in offer.names()}
    fusers = tuple(fuser for offer in offers for fuser in offer.fusers)
    frozen = MappingProxyType
    return Registry(frozen(backends), frozen(layouts), fusers, frozen(sources), tuple(failures), tuple(left_out))


def probe(backend: Backend, device: Device) -> str | None:
    """``backend.probe(device)``, asked once; a probe that raises counts as a refusal with its error."""
    return _ask(backend.probe, device)


@functools.cache
def _ask(question: Callable[[Device], str | None], device: Device) -> str | None:
    try:
        answer = question(device)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user gets the reason in the decision, not a traceback
        return _why(error)
    if answer is not None and not isinstance(answer, str):
        return f"its probe answered {answer!r} where a text or None is wanted"
    return answer


@dataclass(frozen=True, slots=True)
class _Offer:
    source: Source
    backends: tuple[Backend, ...]
    layouts: tuple[ResidentLayout, ...]
    fusers: tuple[FusingMapping, ...]

    def names(self) -> list[str]:
        """The keys of ``Registry.sources``: backends by name, ``layout:name``, ``model type:name``."""
        return [
            *(backend.name for backend in self.backends),
            *(f"layout:{layout.name}" for layout in self.layouts),
            *(f"model type:{name}" for mapping in self.fusers for name in mapping.model_types),
        ]


def _register(source: Source, entry_point: importlib.metadata.EntryPoint) -> _Offer:
    """Import one plugin and call its hooks, in a plugin manager of its own (one raising hook spoils a shared call)."""
    plugin = entry_point.load()
    _check_api(getattr(plugin, "PLUGIN_API", None))
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, entry_point.name)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise PluginError("it has no hook: mark its functions with awq_core.api.hookimpl")
    if source.group == GROUPS[1]:
        fusers = tuple(f for offer in manager.hook.awq_core_fusers() for f in offer)
        _check_kinds((f, FusingMapping) for f in fusers)
        return _Offer(source, (), (), fusers)
    backends = tuple(b for offer in manager.hook.awq_core_backends() for b in offer)
    layouts = tuple(layout for offer in manager.hook.awq_core_layouts() for layout in offer)
    _check_kinds([*((b, Backend) for b in backends), *((layout, ResidentLayout) for layout in layouts)])
    for backend in backends:
        if not backend.kernels:
            raise PluginError(f"backend {backend.name!r} has no kernels")
    layouts += tuple(layout for backend in backends for layout in backend.layouts)
    return _Offer(source, backends, tuple(dict.fromkeys(layouts)), ())


def _check_kinds(pairs: Iterable[tuple[object, type]]) -> None:
    for thing, kind in pairs:
        if not isinstance(thing, kind):
            raise PluginError(f"its hook returned {type(thing).__name__} where awq_core.api.{kind.__name__} is wanted")


def _check_api(wants: object) -> None:
    if wants is None:
        raise PluginError(f"it does not say PLUGIN_API = {hookspecs.PLUGIN_API}, the plugin API that it is written for")
    if wants != hookspecs.PLUGIN_API:
        raise PluginError(
            f"it is written for plugin API {wants!r}, and this awq-core has API {hookspecs.PLUGIN_API}: "
            "install a version of the plugin for this one"
        )


def _check_names(offer: _Offer, others: Iterable[_Offer]) -> None:
    """PluginError where a name is taken. The same layout record may be offered twice."""
    for new in offer.names():
        if offer.names().count(new) > 1:
            raise PluginError(f"it offers two things called {new!r}")
    for other in others:
        # The sets also refuse what cannot be hashed: answers of probes and plans are remembered by these records.
        mine: set[Backend | ResidentLayout] = {*offer.backends, *(set(offer.layouts) - set(other.layouts))}
        taken = set(other.names())
        for model_type in (name for mapping in offer.fusers for name in mapping.model_types):
            if f"model type:{model_type}" in taken:
                raise PluginError(
                    f"a fusing mapping of model type {model_type!r} is offered by {other.source.distribution} already: "
                    "leave it out"
                )
        for record in sorted(mine, key=lambda record: record.name):
            kind = "backend" if isinstance(record, Backend) else "layout"
            if (record.name if kind == "backend" else f"layout:{record.name}") in taken:
                raise PluginError(
                    f"{kind} {record.name!r} of {offer.source.distribution} is offered by {other.source.distribution} "
                    "already: uninstall one of the two distributions"
                )


def _unreadable(offers: Sequence[_Offer]) -> tuple[_Offer, str] | None:
    """An offer with a kernel that could never read what it says, and why."""
    known = {layout.name for offer in offers for layout in offer.layouts} | {ANY_LAYOUT}
    for offer in offers:
        for name, kernel in [(backend.name, kernel) for backend in offer.backends for kernel in backend.kernels]:
            what = f"kernel {name}.{kernel.name} reads layout {kernel.reads!r}"
            if kernel.reads not in known:
                return offer, f"{what}, which nobody offers"
            # A checkpoint layout is kept as it is stored: there is no way into it from another one.
            if kernel.reads in NAMES and any(c.layouts != {kernel.reads} for c in kernel.capabilities):
                return offer, f"{what} as it is stored, so each of its records must say layouts={{{kernel.reads!r}}}"
    return None


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return [point for group in GROUPS for point in importlib.metadata.entry_points(group=group)]


def _order(item: tuple[Source, importlib.metadata.EntryPoint]) -> tuple[bool, str, str, str]:
    source, _ = item
    return (source.distribution != OURS, source.name, source.distribution, source.group)


def _source(entry_point: importlib.metadata.EntryPoint) -> Source:
    """Where it comes from; a distribution whose metadata is damaged has no name."""
    try:
        distribution = entry_point.dist
        name, version = (distribution.name, distribution.version) if distribution is not None else ("", "")
    except Exception:
        name, version = "", ""
    return Source(entry_point.name, entry_point.group, name or "unknown distribution", version or "")


def _why(error: BaseException) -> str:
    """The text of an error; our own sentences need no name in front."""
    return str(error) if isinstance(error, PluginError) else one_line(error)
