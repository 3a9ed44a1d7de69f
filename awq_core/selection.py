"""Plans of this process: the records of all loaded backends put before the dispatcher."""

from __future__ import annotations

from . import dispatch, plugins
from .dispatch import Plan
from .reference import BACKEND as REFERENCE
from .request import Request, current_request
from .spec import LinearSpec


def select(spec: LinearSpec, request: Request | None = None, *, imagined: bool = False, stored: bool = False) -> Plan:
    """The plan for ``spec`` with the installed backends; ``imagined`` devices are not probed.

    ``stored`` admits only kernels that read the weight as it is stored (it is offloaded, nothing can be repacked).

    NoKernelError with all reasons where nothing takes it, PluginError where the forced backend failed to load.
    """
    found = plugins.registry()
    request = request or current_request()
    if request.forced is not None:
        found.backend(request.forced)
    backends = list(found.backends.values())
    if stored:
        backends = [dispatch.only_readers(backend, spec.layout) for backend in backends]
    return dispatch.make_plan(
        spec,
        backends,
        found.layouts,
        request,
        None if imagined else plugins.probe,
        last_resort=REFERENCE,
    )
