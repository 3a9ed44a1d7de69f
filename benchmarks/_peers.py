"""The kernels that ``gpu_linear.py`` sets beside each other: each makes, of one weight, callables that multiply by it.

A peer is ``prepare(case)``, which gives ``calls(x)``: one callable for each copy of the weight. It gives None where it
is not installed or does not take the case.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from awq_core.api import Weight
from awq_core.dispatch import Plan
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.ops import apply_plan
from awq_core.request import Request
from awq_core.selection import select
from awq_core.spec import Device, LinearSpec
from awq_core.testing.data import random_codes

L2_BYTES = 280e6  # more than any L2 holds: copies of a weight take at least as much

Call = Callable[[], torch.Tensor]
Calls = Callable[[torch.Tensor], list[Call]]


@dataclass
class Case:
    """One weight: ``codes`` in canonical form, ``stored`` as a gemm checkpoint has it, ``exact`` [K, N] in float32."""

    spec: LinearSpec
    codes: object
    stored: dict[str, torch.Tensor]
    exact: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return getattr(torch, self.spec.dtype)

    @property
    def packed(self) -> float:
        """Bytes of codes, scales and zero points."""
        numbers = self.spec.in_features * self.spec.out_features
        return numbers / 2 + self.spec.groups * self.spec.out_features * 2.5

    def copies(self, size: float) -> int:
        """How many copies of a weight of ``size`` bytes no L2 holds."""
        return max(2, int(L2_BYTES / size) + 1)


def make_case(k: int, n: int, group_size: int, dtype: str) -> Case:
    """A random weight [k, n] on the GPU."""
    device = torch.device("cuda")
    spec = LinearSpec(k, n, group_size, dtype=dtype, device=Device.of(device))
    codes = random_codes(spec, torch.Generator().manual_seed(0))
    stored = {key: t.to(device) for key, t in checkpoint_layout("gemm").pack(codes).items()}
    return Case(spec, codes, stored, dequantize(codes, torch.float32).to(device))


def planned(case: Case, backend: str | None = None) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan, of one backend where it is named, and the weight as it lies in memory for it."""
    plan = select(case.spec, None if backend is None else Request(forced=backend, source="this benchmark"))
    return plan, plan.resident.prepare(case.spec, case.stored)


def _ours(case: Case, backend: str | None) -> Calls:
    plan, first = planned(case, backend)
    copies = [first, *({k: t.clone() for k, t in first.items()} for _ in range(case.copies(case.packed) - 1))]
    weights = [Weight(case.spec, plan.resident, tensors) for tensors in copies]
    return lambda x: [lambda w=w: apply_plan(plan, w, x, None) for w in weights]


def awq_core(case: Case) -> Calls:
    """What the dispatcher chooses."""
    return _ours(case, None)


def exllama(case: Case) -> Calls:
    """Our ExLlama backend, forced."""
    return _ours(case, "exllama")


def dense(case: Case) -> Calls:
    """PyTorch's linear with the weight in 16 bits."""
    weight = case.exact.to(case.dtype).T.contiguous()
    copies = [weight.clone() for _ in range(case.copies(2 * weight.numel()))]
    return lambda x: [lambda w=w: torch.nn.functional.linear(x, w) for w in copies]


def tinygemm(case: Case) -> Calls | None:
    """PyTorch's int4 kernel: activations in bfloat16, whatever the model's dtype."""
    if case.spec.group_size not in (32, 64, 128, 256) or case.spec.in_features % 1024 or case.spec.out_features % 8:
        return None
    device = case.exact.device
    q = case.codes.codes.T.contiguous().to(device)
    packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
    scale = case.codes.scales.float().to(device)
    pair = torch.stack([scale, (8 - case.codes.zeros.to(device).float()) * scale], -1).to(torch.bfloat16).contiguous()
    copies, g = [packed.clone() for _ in range(case.copies(case.packed))], case.spec.group_size

    def calls(x: torch.Tensor) -> list[Call]:
        wide = x.bfloat16()
        return [lambda w=w: torch.ops.aten._weight_int4pack_mm(wide, w, g, pair) for w in copies]

    return calls


def humming(case: Case) -> Calls | None:
    """humming-kernels, with the configuration that its heuristics name for exactly this M."""
    try:
        from humming.layer import HummingLayer
        from humming.tune import get_heuristics_config
    except ImportError:
        return None
    config = {"quant_method": "awq", "bits": 4, "group_size": case.spec.group_size, "zero_point": True}
    sizes = {"shape_n": case.spec.out_features, "shape_k": case.spec.in_features}
    layer = HummingLayer(**sizes, weight_config=config, torch_dtype=case.dtype).cuda()
    layer.load_from_tensors({name: case.stored[name] for name in ("qweight", "qzeros", "scales")})
    layer.transform()
    layers = [layer, *(copy.deepcopy(layer) for _ in range(case.copies(case.packed) - 1))]

    def calls(x: torch.Tensor) -> list[Call]:
        chosen = get_heuristics_config(layer.humming_config, shape_m=x.shape[0])
        return [lambda one=one: one(x, tuning_config=chosen) for one in layers]

    return calls


def gemlite(case: Case) -> Calls | None:
    """gemlite with the configurations that it ships for the H100."""
    try:
        import gemlite as package
        from gemlite.core import DType, GemLiteLinearTriton
    except ImportError:
        return None
    GemLiteLinearTriton.load_config(str(Path(package.__file__).parent / "configs" / "h100.json"), False)
    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[case.dtype]
    device, (k, n) = case.exact.device, (case.spec.in_features, case.spec.out_features)
    layer = GemLiteLinearTriton(4, case.spec.group_size, k, n, input_dtype=kind, output_dtype=kind)
    q = case.codes.codes.T.contiguous().to(device, torch.uint8)
    scales, zeros = (t.T.contiguous().to(device, case.dtype) for t in (case.codes.scales, case.codes.zeros))
    layer.pack(q, scales, zeros, None, fma_mode=False)
    layers = [layer, *(copy.deepcopy(layer) for _ in range(case.copies(case.packed) - 1))]
    return lambda x: [lambda one=one: one(x) for one in layers]


PEERS: dict[str, tuple[Callable[[Case], Calls | None], int]] = {  # what prepares it, and the most rows worth timing
    "awq-core": (awq_core, 1 << 30),
    "dense": (dense, 1 << 30),
    "humming": (humming, 1 << 30),
    "tinygemm bf16": (tinygemm, 64),
    "gemlite": (gemlite, 1 << 30),
    "awq-core exllama": (exllama, 1 << 30),
}
