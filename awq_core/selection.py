"""Plans of this process: the records of all loaded backends put before the dispatcher."""

from __future__ import annotations

from . import dispatch, plugins
from .dispatch import Plan, Probe
from .notice import tell
from .plugins import Registry
from .reference import BACKEND as REFERENCE
from .request import Request, current_request
from .spec import LinearSpec


def select(spec: LinearSpec, request: Request | None = None, *, imagined: bool = False, stored: bool = False) -> Plan:
    """The plan for ``spec`` with the installed backends; ``imagined`` devices are not probed.

    ``stored`` admits only kernels that read the weight as it is stored (it is offloaded, nothing can be repacked).

    NoKernelError with all reasons where nothing takes it, PluginError where the forced backend failed to load. A name
    in ``prefer`` or AWQ_CORE_DISABLE that nobody has is told to the user, once.
    """
    found = plugins.registry()
    request = request or current_request()
    if request.forced is not None:
        found.backend(request.forced)
    probe, resident = None if imagined else plugins.probe, spec.layout if stored else None
    plans, asked = _plans_of(found), (spec, request, probe, resident)
    if asked not in plans:
        _tell_unknown(request, found)
        backends = list(found.backends.values())
        plans[asked] = dispatch.make_plan(
            spec, backends, found.layouts, request, probe, last_resort=REFERENCE, resident=resident
        )
    return plans[asked]


Asked = tuple[LinearSpec, Request, Probe | None, str | None]
_latest: list[tuple[Registry, dict[Asked, Plan]]] = []


def _plans_of(found: Registry) -> dict[Asked, Plan]:
    """The plans made from this registry: a model has hundreds of linears and a handful of shapes."""
    if not _latest or _latest[0][0] is not found:
        _latest[:] = [(found, {})]
    return _latest[0][1]


def _tell_unknown(request: Request, found: Registry) -> None:
    kernels = {f"{name}.{kernel.name}" for name, backend in found.backends.items() for kernel in backend.kernels}
    unknown = [("prefer()", name) for name in request.preferred if name not in found.backends]
    unknown += [("AWQ_CORE_DISABLE", name) for name in sorted(request.disabled - {*found.backends} - kernels)]
    for source, name in unknown:
        tell(f"{source} names {name!r}, which is not installed; {found.known()}")
