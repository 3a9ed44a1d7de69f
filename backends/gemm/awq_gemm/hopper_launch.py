"""Launching the Hopper kernel: descriptors for its copies, grid and scratch."""

from __future__ import annotations

import functools
import threading

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from awq_core.api import Weight
from awq_core.fragments.launch import interpreted

from . import hopper, launch
from .hopper_tiles import way_for

TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@functools.cache
def shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile [rows, columns] lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], TYPES[dtype])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of this GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_threads = threading.local()


def enter(device: torch.device) -> None:
    """Make the device's context that of this thread: descriptors are made before the launch that would do so."""
    seen: set[torch.device] = _threads.__dict__.setdefault("seen", set())
    if device not in seen:
        torch.zeros(1, device=device)
        seen.add(device)


def product(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] to [M, N], float32 accumulation; core adds the bias."""
    spec, t = weight.spec, weight.tensors
    rows, k, n = x.shape[0], spec.in_features, spec.out_features
    # Triton's interpreter does not know Gluon.
    found = None if interpreted() else way_for(rows, k, n, multiprocessors(x.device))
    if found is None:
        return launch.matmul(weight, x, bias)
    way, split = found
    if rows * n >= 1 << 31:  # places in a part are 32-bit numbers
        split = 1
    units = triton.cdiv(n, way.n) * triton.cdiv(rows, way.m) * split
    enter(x.device)
    if x.data_ptr() % 16:  # copies of tiles begin at multiples of 16 bytes
        x = x.clone()
    y = x.new_empty(rows, n)
    width = 16 * way.planes
    parts = torch.empty(split, rows, n, dtype=torch.float32, device=x.device) if split > 1 else t["scales"]
    hopper.product[(min(units, multiprocessors(x.device) * way.programs),)](
        TensorDescriptor.from_tensor(x, [way.m, width], shared_layout(way.m, width, x.dtype)),
        TensorDescriptor.from_tensor(y, [way.m, way.n], shared_layout(way.m, way.n, x.dtype)),
        t["words"],
        t["scales"],
        t["zeros"],
        parts,
        k,
        n,
        rows,
        GP=spec.group_size // 16,
        NT=way.n,
        MT=way.m,
        P=way.planes,
        SPLIT=split,
        STAGES=way.stages,
        num_warps=way.warps,
    )
    if split > 1:
        launch.add_parts(parts, y)
    return y
