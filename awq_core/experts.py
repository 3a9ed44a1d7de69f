"""AwqExperts: the quantized form of a mixture-of-experts block whose weights are stacked in 3-D tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ops import linear
from .packed import PackedModule, PackedWeight, bind_for
from .spec import LinearSpec


class AwqExperts(PackedModule):
    """E experts of the form ``down(act(gate(x)) * up(x))``, gate and up joined on N.

    Parameters, in checkpoint layout with a leading expert dimension: ``gate_up_proj_qweight`` [E, ...] for
    hidden_size -> 2 * intermediate_size, ``down_proj_qweight`` [E, ...] for intermediate_size -> hidden_size, and their
    ``_qzeros`` and ``_scales``. Experts are run one after the other, those only that a token was sent to.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        group_size: int,
        layout: str = "gemm",
        zero_point: bool = True,
        dtype: torch.dtype | None = None,
        scales_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = num_experts, act_fn
        self.dtype = dtype or torch.get_default_dtype()
        for name, k, n in (
            ("gate_up_proj", hidden_size, 2 * intermediate_size),
            ("down_proj", intermediate_size, hidden_size),
        ):
            group = k if group_size == -1 else group_size
            spec = LinearSpec(k, n, group, layout, zero_point, experts=num_experts)
            self.packed[name] = PackedWeight(self, f"{name}_", spec, scales_dtype)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, hidden_size], top_k_index and top_k_weights [T, top_k] to [T, hidden_size]."""
        if any(w.plan is None for w in self.packed.values()) or hidden_states.dtype is not self.dtype:
            bind_for(self, hidden_states.dtype)
        out = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if not 0 <= expert < self.num_experts:  # expert parallelism marks tokens of other ranks so
                continue
            token, place = torch.where(top_k_index == expert)
            gate, up = self._project("gate_up_proj", expert, hidden_states[token]).chunk(2, dim=-1)
            y = self._project("down_proj", expert, self.act_fn(gate) * up)
            out.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out

    def _project(self, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        weight = self.packed[name]
        assert weight.plan is not None
        tensors = {n: t[expert] for n, t in weight.tensors().items()}
        return linear(weight.plan, weight.key, tensors, x, None)
