"""AwqLinear: checkpoint tensors in, a bound plan, forward, checkpoint tensors out."""

from __future__ import annotations

import torch
from torch import nn

from .errors import LayoutError
from .ops import linear
from .packed import PackedModule, PackedWeight, bind_for
from .spec import LinearSpec


class AwqLinear(PackedModule):
    """A quantized linear ``[..., K] -> [..., N]``.

    Args:
        in_features: K.
        out_features: N.
        group_size: g along K; -1 is one group a column.
        layout: checkpoint layout of the tensors (``gemm``, ``gemv``, ``gemv_fast``, ``llm_awq``, ``marlin``).
        bias: whether a bias [N] exists, in ``dtype``.
        zero_point: False where the codes are symmetric.
        dtype: of the activations, float16, bfloat16 or float32 (default: torch's default dtype).
        scales_dtype: of the stored scales; never cast, kernels cast in registers.

    The parameters are those of the layout (``qweight``, ``qzeros``, ``scales``; shapes stand in the layout's file).
    ``bind()`` chooses kernels for the device on which they lie; the first forward binds what was not bound.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int = 128,
        layout: str = "gemm",
        bias: bool = False,
        zero_point: bool = True,
        dtype: torch.dtype | None = None,
        scales_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        group = in_features if group_size == -1 else group_size
        if group <= 0 or in_features % group:
            raise LayoutError(f"group_size {group_size} does not divide in_features {in_features}")
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        spec = LinearSpec(in_features, out_features, group, layout, zero_point, bias)
        self.weight_state = PackedWeight(self, "", spec, scales_dtype)
        self.packed[""] = self.weight_state
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=self.dtype)) if bias else None)

    @property
    def spec(self) -> LinearSpec:
        """The problem, as bound where it is bound."""
        plan = self.weight_state.plan
        return self.weight_state.spec if plan is None else plan.spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in float16, bfloat16 or float32 to [..., out_features] in the same dtype."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"AwqLinear wants [..., {self.in_features}], got {list(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        state = self.weight_state
        plan = state.plan
        if plan is None or x.dtype is not self.dtype:
            bind_for(self, x.dtype)
            plan = state.plan
            assert plan is not None
        return linear(plan, state.key, state.tensors(), x, self.bias, state.held)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [N, K], as nn.Linear holds it, in ``dtype`` (default: the activations')."""
        from .layouts import checkpoint_layout, dequantize

        spec = self.spec
        codes = checkpoint_layout(spec.layout).unpack(
            self.weight_state.checkpoint(), spec.in_features, spec.out_features, spec.group_size
        )
        return dequantize(codes, dtype or self.dtype).T

    def extra_repr(self) -> str:
        """Shape, group, layout and the bound plan."""
        from .explain import plan_line

        spec, plan = self.spec, self.weight_state.plan
        bound = "unbound" if plan is None else plan_line(plan)
        return f"K={spec.in_features}, N={spec.out_features}, g={spec.group_size}, {spec.layout}, {bound}"
