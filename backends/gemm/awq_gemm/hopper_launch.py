"""Launching the Hopper kernel: descriptors for its copies, grid and scratch."""

from __future__ import annotations

import functools
import threading

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from awq_core.api import LinearSpec, Weight
from awq_core.fragments.launch import COUNTERS, Launch, counters, interpreted, launch_options, multiprocessors

from . import hopper, launch
from .hopper_tiles import WAYS, Work, tiles_of, work_for
from .plugin import FEWEST_HOPPER

MOST_LEFT = 512  # rows up to which ``work_for`` leaves some problems to the plain kernel
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@functools.cache
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile [rows, columns] lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], TYPES[dtype])


_threads = threading.local()


def enter(device: torch.device) -> None:
    """Make the device's context that of this thread: descriptors are made before the launch that would do so."""
    seen: set[torch.device] = _threads.__dict__.setdefault("seen", set())
    if device not in seen:
        torch.zeros(1, device=device)
        seen.add(device)


def product(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N], float32 accumulation; core adds the bias."""
    spec = weight.spec
    if interpreted():  # Triton's interpreter does not know Gluon
        return launch.matmul(weight, x, bias)
    _compile(weight, x)
    found = _work(x.shape[0], spec, x.device)
    return launch.matmul(weight, x, bias) if found is None else run(weight, x, found)


_compiled: set[tuple[object, ...]] = set()


def _compile(weight: Weight, x: torch.Tensor) -> None:
    """Run once in every way, so that the first prompt of another length need not wait for a compiler.

    Binding a weight comes here first. What of ``product`` differs only in K and N Triton shares.
    """
    spec, n = weight.spec, weight.spec.out_features
    if (spec, x.device) in _compiled or torch.cuda.is_current_stream_capturing():
        return
    _compiled.add((spec, x.device))
    few = x[:FEWEST_HOPPER]
    for way in WAYS:
        tiles = tiles_of(way, few.shape[0], n)
        programs = min(tiles, multiprocessors(x.device))
        for shared in (0, programs):
            run(weight, few, Work(way, programs, shared))
    left = [rows for rows in range(FEWEST_HOPPER, MOST_LEFT + 1) if _work(rows, spec, x.device) is None]
    for rows in launch.forms(spec, x.device, left):
        launch.matmul(weight, x.new_zeros(rows, spec.in_features), None)


def _work(rows: int, spec: LinearSpec, device: torch.device) -> Work | None:
    return work_for(rows, spec.in_features, spec.out_features, multiprocessors(device))


def run(weight: Weight, x: torch.Tensor, work: Work) -> torch.Tensor:
    """x [M, K] to [M, N] in the given way."""
    spec, t, way = weight.spec, weight.tensors, work.way
    assert work.shared <= COUNTERS, work
    rows, k, n = x.shape[0], spec.in_features, spec.out_features
    enter(x.device)
    if x.data_ptr() % 16:  # copies of tiles begin at multiples of 16 bytes
        x = x.clone()
    y = x.new_empty(rows, n)
    width = 16 * way.planes
    parts = arrived = t["scales"]  # not written
    if work.shared:
        parts = torch.empty(work.programs, way.n, way.m, dtype=torch.float32, device=x.device)
        arrived = counters(x.device)
    _product(spec, x.device, work)(
        (t["words"], t["scales"], t["zeros"], parts, arrived),
        TensorDescriptor.from_tensor(x, [way.m, width], shared_layout(way.m, width, x.dtype)),
        TensorDescriptor.from_tensor(y, [way.m, way.n], shared_layout(way.m, way.n, x.dtype)),
        k,
        n,
        rows,
        work.shared,
    )
    return y


@functools.lru_cache(maxsize=4096)
def _product(spec: LinearSpec, device: torch.device, work: Work) -> Launch:
    way = work.way
    constants = {
        "GP": spec.group_size // 16,
        "NT": way.n,
        "MT": way.m,
        "P": way.planes,
        "SHARED": work.shared > 0,
        "STAGES": way.stages,
    }
    options = {"num_warps": way.warps, **launch_options(device)}
    return Launch(hopper.product, (work.programs,), constants, options)
