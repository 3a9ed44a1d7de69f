"""The plans of a checkpoint's linears, as tables and as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from ..dispatch import Band, Plan, Refusal
from ..explain import plan_data, plan_line, plan_text, resident_bytes
from ..request import Request, current_request
from ..resident import checkpoint_bytes
from ..selection import select
from ..spec import LinearSpec
from ._output import size, table


@dataclass(frozen=True)
class Planned:
    """A distinct linear of a model: how often it occurs, and its plan."""

    count: int
    plan: Plan

    @property
    def resident_bytes(self) -> int | None:
        """Bytes in memory of one of them; None where a plugin's layout does not say."""
        return resident_bytes(self.plan)


def requested(version: str | None) -> Request:
    """The request in force, with the option ``--version`` as the strongest word."""
    if version is None:
        return current_request()
    from ..options import UserOptions

    return replace(current_request(UserOptions(version=version).request), source=f"--version {version}")


def plan_all(linears: Counter[LinearSpec], request: Request, imagined: bool = False) -> list[Planned]:
    """A plan for each distinct linear, the largest first; NoKernelError where one has none."""
    specs = sorted(linears, key=lambda s: (-s.in_features * s.out_features, s.in_features, str(s)))
    return [Planned(linears[spec], select(spec, request, imagined=imagined)) for spec in specs]


def shape(spec: LinearSpec) -> str:
    """``K x N``, with the group size and what else tells it from others."""
    text = f"{spec.in_features} x {spec.out_features} g={spec.group_size}"
    return f"{text} {spec.experts} experts" if spec.experts else text


def band_at(plan: Plan, m: int) -> Band:
    """The band of the plan that holds M = ``m``."""
    return next(band for band in plan.bands if m in band.rows)


def chosen_table(planned: Iterable[Planned], m: int | None = None) -> Table:
    """One line a distinct linear: kernels by M (or the one for M = ``m``), resident layout, memory price."""
    rows = []
    for item in planned:
        spec, plan = item.plan.spec, item.plan
        kernels = plan_line(plan).replace(" | ", "\n") if m is None else f"M {m} {band_at(plan, m).candidate.name}"
        resident = item.resident_bytes
        price = size(resident) if resident is None else f"{size(resident)} ({resident / checkpoint_bytes(spec):.2f}x)"
        layout = f"{plan.resident.name}: {plan.resident.note}" if plan.resident.note else plan.resident.name
        rows.append((item.count, shape(spec), spec.layout, kernels, layout, price))
    title = "Kernels by M (rows of the activation: batch x sequence)"
    return table(title, ">count | K x N | stored as | kernels | in memory as | >memory each", rows)


def not_chosen(planned: Iterable[Planned], m: int | None = None) -> list[tuple[str, str, list[str]]]:
    """(kernel, why, shapes) of the kernels that a plan has for no M: what was refused, and what ranks lower."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for item in planned:
        plan = item.plan
        band = None if m is None else band_at(plan, m)
        decision = plan.decision if band is None else band.decision
        used = {b.candidate.name for b in (plan.bands if band is None else (band,))}
        best = decision.accepted[0].capability.priority
        lines = [(refusal.name, reasons_text(refusal)) for refusal in decision.refused]
        lines += [
            (c.name, f"takes it, but ranks lower: priority {c.capability.priority}, the chosen one has {best}")
            for c in decision.accepted[1:]
        ]
        for name, why in lines:
            if name not in used:
                grouped.setdefault((name, why), []).append(shape(plan.spec))
    return [(name, why, shapes) for (name, why), shapes in sorted(grouped.items())]


def not_chosen_table(planned: list[Planned], m: int | None = None) -> Table:
    """The kernels that were not taken, with all reasons; equal reasons stand once."""
    rows = [
        (name, why, "all" if len(shapes) == len(planned) else "\n".join(shapes))
        for name, why, shapes in not_chosen(planned, m)
    ]
    return table(f"Not chosen at M={m or 1}", "kernel | why | for", rows)


def reasons_text(refusal: Refusal) -> str:
    """All reasons of a refusal, one a line."""
    return "\n".join(str(reason) for reason in refusal.reasons)


def full_text(item: Planned) -> str:
    """The plan of one linear with every refusal in every range of M."""
    return f"{item.count} x {plan_text(item.plan)}"


def planned_data(item: Planned) -> dict[str, Any]:
    """The same as plain data."""
    return {"count": item.count, **plan_data(item.plan)}
