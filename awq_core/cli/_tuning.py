"""What ``awq tune`` does for one plan: which configs it tries, and how one is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..dispatch import Plan
from ..kernel import Kernel
from ..spec import LinearSpec
from ..tuning import Config, Measured, band, representatives, trial

if TYPE_CHECKING:
    import torch

WORTH = 0.97  # a config must be this much faster than the default, or noise would choose
AGREES = 0.02  # how far the results of two configs may lie apart, relative to their size


@dataclass(frozen=True)
class Job:
    """One kernel of a plan at one M, and the configs to try."""

    name: str
    kernel: Kernel
    spec: LinearSpec
    rows: int
    configs: tuple[Mapping[str, int], ...]


Timer = Callable[[Job, Config | None], float]


def jobs_of(plan: Plan, most: int) -> list[Job]:
    """What there is to measure for a plan, up to M = ``most``: each band's largest M of each kernel with a choice."""
    found: dict[tuple[str, int], Job] = {}
    for part in plan.bands:
        kernel, name = part.candidate.kernel, part.candidate.name
        if part.rows.first > most:
            continue
        for rows in representatives(part.rows.first, part.rows.last, most):
            configs = tuple(kernel.tunables(plan.spec, rows))
            if configs:
                found[name, band(rows)] = Job(name, kernel, plan.spec, rows, configs)  # the largest M comes last
    return list(found.values())


def search(job: Job, time: Timer) -> Measured:
    """The fastest config, no config where the default is about as fast; configs that fail or differ are left out."""
    default_us = time(job, None)
    best, config = default_us, {}
    for tried in job.configs:
        try:
            us = time(job, tried)
        except Exception:  # too much shared memory, a compiler's limit: such a config is none
            continue
        if us < best and us < WORTH * default_us:
            best, config = us, dict(tried)
    s = job.spec
    size = (s.in_features, s.out_features, s.group_size, s.dtype)
    return Measured(job.name, *size, band(job.rows), config, best, default_us)


def gpu_timer(plan: Plan, place: torch.device) -> Timer:
    """A timer on random weights: the median microseconds of one call, each with a cold L2."""
    import torch
    import triton

    from ..kernel import Weight
    from ..layouts import checkpoint_layout
    from ..testing.data import random_codes

    spec = replace(plan.spec, experts=0)
    generator = torch.Generator().manual_seed(0)
    codes = random_codes(spec, generator)
    stored = {n: t.to(place) for n, t in checkpoint_layout(spec.layout).pack(codes).items()}
    weight = Weight(spec, plan.resident, plan.resident.prepare(spec, stored))
    del stored
    right: dict[tuple[str, int], torch.Tensor] = {}

    def time(job: Job, config: Config | None) -> float:
        x = torch.randn(job.rows, spec.in_features, generator=torch.Generator(place).manual_seed(1), device=place)
        x = x.to(getattr(torch, spec.dtype))

        def call() -> torch.Tensor:
            return job.kernel.apply(weight, x, None)

        with trial(job.name, config):
            y = call().float()
            wanted = right.setdefault((job.name, job.rows), y)
            if not (y - wanted).norm() <= AGREES * wanted.norm():
                raise ValueError(f"{job.name} with {config} computes something else")
            return 1e3 * float(triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median"))

    return time
