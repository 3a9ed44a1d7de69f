"""Group sizes and bytes, from the numbers of a LinearSpec alone: no torch."""

from __future__ import annotations

import functools
import math

from awq_core.api import LinearSpec, checkpoint_layout

OP_GROUPS = (256, 128, 64, 32)
ITEM_BYTES = {"int32": 4, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}


@functools.cache
def op_group(group_size: int) -> int:
    """The largest group size of PyTorch's int4 kernel that divides ``group_size`` (a multiple of 32)."""
    return next(g for g in OP_GROUPS if group_size % g == 0)


def int4pack_bytes(spec: LinearSpec) -> int:
    """Bytes of ``cpu_int4pack``: scales of two bytes and zero points that need not be kept, which is the usual case."""
    k, n = spec.in_features, spec.out_features
    one = n * k // 2 + k // op_group(spec.group_size) * n * 2 * 2 + spec.groups * n * 2
    return one * max(1, spec.experts)


def dense_bytes(spec: LinearSpec) -> int:
    """Bytes of ``cpu_dense``: the dense copy and the checkpoint tensors."""
    shapes = checkpoint_layout(spec.layout).shapes(spec.in_features, spec.out_features, spec.group_size)
    stored = sum(math.prod(t.shape) * ITEM_BYTES[t.dtypes[0]] for t in shapes.values())
    return (stored + spec.in_features * spec.out_features * ITEM_BYTES[spec.dtype]) * max(1, spec.experts)
