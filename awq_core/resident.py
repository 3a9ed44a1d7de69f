"""Checkpoint layouts as resident layouts: the weight is used as it is stored, nothing is copied."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .kernel import ResidentLayout
from .layouts import checkpoint_layout, dequantize
from .spec import LinearSpec

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"int32": 4, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}


def checkpoint_bytes(spec: LinearSpec) -> int:
    """Bytes of the checkpoint tensors of one module (bias left out), all experts counted."""
    shapes = checkpoint_layout(spec.layout).shapes(spec.in_features, spec.out_features, spec.group_size)
    one = sum(math.prod(t.shape) * ITEM_BYTES[t.dtypes[0]] for t in shapes.values())
    return one * max(1, spec.experts)


@functools.cache
def as_stored(layout: str) -> ResidentLayout:
    """The resident layout of that name which keeps the checkpoint tensors as they are."""

    def keep(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(tensors)

    def dense(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        codes = checkpoint_layout(layout).unpack(tensors, spec.in_features, spec.out_features, spec.group_size)
        return dequantize(codes, dtype)

    return ResidentLayout(layout, keep, keep, dense, checkpoint_bytes)
