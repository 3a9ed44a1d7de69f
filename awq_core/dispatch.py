"""The dispatcher: which kernel for this problem, and why not the others. Pure functions of records, no I/O.

``choose`` decides for one M; ``make_plan`` covers all M with kernels that read one resident layout, so that there is
one copy of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .capability import Capability, Reason, check
from .errors import LayoutError, NoKernelError
from .guard import one_line
from .kernel import ANY_LAYOUT, Backend, Kernel, ResidentLayout
from .request import Request
from .spec import Device, LinearSpec, Rows

Probe = Callable[[Backend, Device], str | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel with the record of it that accepted."""

    backend: str
    kernel: Kernel
    capability: Capability

    @property
    def name(self) -> str:
        """``backend.kernel``, which is also what AWQ_CORE_DISABLE takes."""
        return f"{self.backend}.{self.kernel.name}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kernel that was not taken, with all the reasons against it (of its nearest record)."""

    name: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """For one problem and one M: the kernels that accept, best first, and the others with their reasons."""

    spec: LinearSpec
    m: int
    request: Request
    accepted: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The kernel to use, or None."""
        return self.accepted[0] if self.accepted else None


@dataclass(frozen=True, slots=True)
class Band:
    """One range of M and its kernel."""

    rows: Rows
    decision: Decision

    @property
    def candidate(self) -> Candidate:
        """The chosen kernel; a Band always has one."""
        return self.decision.accepted[0]


@dataclass(frozen=True, slots=True)
class Plan:
    """Kernels by M for one module, without holes, all reading ``resident``. ``decision`` is the one for M = 1."""

    spec: LinearSpec
    resident: ResidentLayout
    bands: tuple[Band, ...]
    decision: Decision

    def kernel(self, m: int) -> Kernel:
        """The kernel for M rows."""
        for band in self.bands:
            last = band.rows.last
            if last is None or m <= last:
                return band.decision.accepted[0].kernel
        raise AssertionError("a plan has no holes")  # the last band has no upper end

    @property
    def compile_safe(self) -> bool:
        """Whether every kernel of the plan may run under torch.compile and graph capture."""
        return all(band.candidate.capability.compile_safe for band in self.bands)


def choose(
    spec: LinearSpec,
    m: int,
    backends: Iterable[Backend],
    request: Request | None = None,
    probe: Probe | None = None,
    resident: str | None = None,
) -> Decision:
    """Rank every kernel for ``spec`` at M = ``m``. Without ``probe`` the backends are not asked whether they can run
    here: that is for devices that are not in this machine. ``resident`` admits only kernels that read that layout.
    """
    request = request or Request()
    accepted: list[Candidate] = []
    refused: list[Refusal] = []
    for backend in sorted(backends, key=lambda b: b.name):
        for kernel in backend.kernels:
            name = f"{backend.name}.{kernel.name}"
            found = _best_record(kernel, spec, m)
            reasons = _against(backend, kernel, request)
            if not _reads(kernel, resident):
                reasons += (Reason("resident", f"a weight kept as {kernel.reads}", f"one kept as {resident}"),)
            if isinstance(found, Capability):
                veto = _veto(kernel, spec)
                if veto is not None:
                    reasons += (veto,)
                if not reasons and probe is not None:
                    problem = probe(backend, spec.device)
                    if problem is not None:
                        reasons += (Reason("available", f"backend {backend.name} to run here", problem),)
                if not reasons:
                    accepted.append(Candidate(backend.name, kernel, found))
                    continue
            else:
                reasons += found
            refused.append(Refusal(name, reasons))
    accepted.sort(key=lambda c: _rank(c, spec, request))
    return Decision(spec, m, request, tuple(accepted), tuple(refused))


def make_plan(
    spec: LinearSpec,
    backends: Sequence[Backend],
    layouts: Mapping[str, ResidentLayout],
    request: Request | None = None,
    probe: Probe | None = None,
    last_resort: Backend | None = None,
    resident: str | None = None,
) -> Plan:
    """The plan for one module. NoKernelError, with the whole trace, where nothing takes M = 1.

    The winner at M = 1 fixes the resident layout. Every other range of M gets the best kernel that reads that layout;
    ``last_resort`` (a kernel that reads any layout) fills what is left, also when a backend was forced. ``resident``
    fixes the layout beforehand. LayoutError where ``layouts`` lacks the one that the weight would lie in.
    """
    request = request or Request()
    decision = choose(spec, 1, backends, request, probe, resident)
    if decision.chosen is None:
        from .explain import refusal_text

        raise NoKernelError(refusal_text(decision), decision)
    reads = decision.chosen.kernel.reads
    kept = resident or spec.layout if reads == ANY_LAYOUT else reads
    if kept not in layouts:
        raise LayoutError(f"layout {kept!r} does not exist: the layouts are {', '.join(sorted(layouts))}")
    bands: list[Band] = []
    for rows in _ranges(backends, spec, kept):
        here = choose(spec, rows.first, backends, request, probe, kept)
        if here.chosen is None and last_resort is not None:
            fallback = choose(spec, rows.first, [last_resort], Request(disabled=request.disabled), probe, kept)
            redone = {candidate.name for candidate in fallback.accepted} | {r.name for r in fallback.refused}
            refused = tuple(r for r in here.refused if r.name not in redone) + fallback.refused
            here = Decision(spec, rows.first, request, fallback.accepted, refused)
        if here.chosen is None:
            from .explain import refusal_text

            raise NoKernelError(refusal_text(here), here)
        if bands and bands[-1].candidate == here.accepted[0]:
            bands[-1] = Band(Rows(bands[-1].rows.first, rows.last), bands[-1].decision)
        else:
            bands.append(Band(rows, here))
    return Plan(spec, layouts[kept], tuple(bands), decision)


def _best_record(kernel: Kernel, spec: LinearSpec, m: int) -> Capability | tuple[Reason, ...]:
    """The accepting record of the highest priority, else the reasons of the record that comes nearest."""
    checked = [(record, check(record, spec, m)) for record in kernel.capabilities]
    accepting = [record for record, reasons in checked if not reasons]
    if accepting:
        return max(accepting, key=lambda record: record.priority)
    if not checked:
        return (Reason("capabilities", "at least one record", "none declared"),)
    return min((reasons for _, reasons in checked), key=len)


def _against(backend: Backend, kernel: Kernel, request: Request) -> tuple[Reason, ...]:
    reasons: tuple[Reason, ...] = ()
    if request.forced is not None and backend.name != request.forced:
        reasons += (Reason("request", f"backend {request.forced} ({request.source})", f"backend {backend.name}"),)
    for name in (backend.name, f"{backend.name}.{kernel.name}"):
        if name in request.disabled:
            reasons += (Reason("request", "a kernel that is not disabled", f"{name} in AWQ_CORE_DISABLE"),)
    return reasons


def _veto(kernel: Kernel, spec: LinearSpec) -> Reason | None:
    """``kernel.refuses(spec)``; a function that fails counts as a refusal, since it is a plugin's and others go on."""
    try:
        veto = kernel.refuses(spec)
    except Exception as error:
        return Reason("refuses", "an answer of the kernel's own check", one_line(error))
    if veto is not None and not isinstance(veto, Reason):
        return Reason("refuses", "a Reason or None from the kernel's own check", repr(veto))
    return veto


def _reads(kernel: Kernel, resident: str | None) -> bool:
    return resident is None or kernel.reads in (ANY_LAYOUT, resident)


def _rank(candidate: Candidate, spec: LinearSpec, request: Request) -> tuple[int, int, bool, str]:
    preferred = request.preferred
    place = preferred.index(candidate.backend) if candidate.backend in preferred else len(preferred)
    repacks = candidate.kernel.reads not in (ANY_LAYOUT, spec.layout)
    return (place, -candidate.capability.priority, repacks, candidate.name)


def _ranges(backends: Sequence[Backend], spec: LinearSpec, resident: str) -> list[Rows]:
    """M split at every edge of a record that takes ``spec`` for some M and whose kernel reads ``resident``."""
    firsts = {1}
    kernels = [kernel for backend in backends for kernel in backend.kernels if _reads(kernel, resident)]
    for record in (record for kernel in kernels for record in kernel.capabilities):
        if not check(record, spec):
            firsts.add(record.rows.first)
            if record.rows.last is not None:
                firsts.add(record.rows.last + 1)
    starts = sorted(firsts)
    ends: list[int | None] = [start - 1 for start in starts[1:]]
    return [Rows(first, last) for first, last in zip(starts, [*ends, None], strict=True)]
