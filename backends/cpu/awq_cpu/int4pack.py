"""``cpu_int4pack``: a weight as PyTorch's int4 kernel reads it, the kernel itself, and the way back to the checkpoint.

* ``packed`` uint8 [N, K/2]: the codes, laid out as ``packing.py`` says
* ``scale_and_zero`` bfloat16 [K/g', N, 2]: ``scale`` and ``(8 - zero) * scale``, so that
  ``w = (code - 8) * scale_and_zero[..., 0] + scale_and_zero[..., 1]``; g' is the largest of 256, 128, 64 and 32 that
  divides g, and each group's pair is repeated g / g' times
* ``scales`` [K/g, N]: as stored, because bfloat16 has fewer digits
* ``zeros`` uint8 [K/g, N] or ``scaled_zeros`` [K/g, N], as stored: only where they don't follow from the other two, bit
  for bit (a scale of 0, or scaled zeros that are no whole multiple of the scale)

With experts every tensor has a leading dimension E.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from awq_core.api import Codes, LinearSpec, Weight, checkpoint_layout
from awq_core.api import dequantize as dense_of

from .packing import MATMUL, gemm_columns, pack_codes, pack_gemm_words, unpack_codes
from .sizes import op_group

SCALED = frozenset({"gemv_fast", "llm_awq"})  # layouts that store -(scale * zero) in floating point


def apply(weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """PyTorch's int4 kernel: x bfloat16 [M, K] to [M, N]; core adds the bias."""
    tensors = weight.tensors
    y: torch.Tensor = MATMUL(x, tensors["packed"], op_group(weight.spec.group_size), tensors["scale_and_zero"])
    return y


def prepare(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Checkpoint tensors of any layout to resident tensors; the inputs are neither changed nor kept."""
    if not spec.experts:
        packed, grouped = _read(spec, tensors)
        pairs = _pairs(spec, grouped)
        return {"packed": packed, "scale_and_zero": pairs, **_kept(spec, grouped, pairs)}
    one = replace(spec, experts=0)
    n, k, e = spec.out_features, spec.in_features, spec.experts
    packed = torch.empty(e, n, k // 2, dtype=torch.uint8)  # filled one by one: a stack would hold all of them twice
    groups: list[Codes] = []
    for i in range(e):
        packed[i], grouped = _read(one, {name: t[i] for name, t in tensors.items()})
        groups.append(grouped)
    pairs_of_each = [_pairs(one, grouped) for grouped in groups]
    kept = [_kept(one, grouped, own) for grouped, own in zip(groups, pairs_of_each, strict=True)]
    extra = "scaled_zeros" if spec.layout in SCALED else "zeros"
    if any(extra in k for k in kept):
        kept = [{**k, extra: getattr(grouped, extra)} for k, grouped in zip(kept, groups, strict=True)]
    rest = [{"scale_and_zero": own, **k} for k, own in zip(kept, pairs_of_each, strict=True)]
    return {"packed": packed, **{name: torch.stack([r[name] for r in rest]) for name in rest[0]}}


def restore(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint tensors in ``spec.layout``, bit for bit."""
    pack = checkpoint_layout(spec.layout).pack
    if not spec.experts:
        return pack(_codes(spec, tensors))
    one = replace(spec, experts=0)
    out: dict[str, torch.Tensor] = {}
    for i in range(spec.experts):
        for name, tensor in pack(_codes(one, {n: t[i] for n, t in tensors.items()})).items():
            if name not in out:
                out[name] = tensor.new_empty(spec.experts, *tensor.shape)
            out[name][i] = tensor
    return out


def dequantize(spec: LinearSpec, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [K, N] with the stored scales, computed in float32 and rounded once to ``dtype``."""
    return dense_of(_codes(spec, tensors), dtype)


def _read(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Codes]:
    """The packed codes, and the rest as Codes whose own ``codes`` are empty."""
    if spec.layout == "gemm":
        zeros = gemm_columns(tensors["qzeros"])
        return pack_gemm_words(tensors["qweight"]), Codes(zeros[:0], zeros, tensors["scales"])
    codes = checkpoint_layout(spec.layout).unpack(tensors, spec.in_features, spec.out_features, spec.group_size)
    return pack_codes(codes.codes), replace(codes, codes=codes.codes[:0])


def _pairs(spec: LinearSpec, grouped: Codes) -> torch.Tensor:
    """``scale_and_zero``, computed in float32 and rounded once."""
    scales = grouped.scales.to(torch.float32)
    if grouped.scaled_zeros is not None:
        zero_terms = scales * 8 + grouped.scaled_zeros.to(torch.float32)
    else:
        zero_terms = (8 - grouped.zeros.to(torch.float32)).mul_(scales)
    pairs = torch.empty(*scales.shape, 2, dtype=torch.bfloat16)
    pairs[..., 0], pairs[..., 1] = scales, zero_terms  # half the time of a stack and a cast
    repeats = spec.group_size // op_group(spec.group_size)
    return pairs if repeats == 1 else pairs.repeat_interleave(repeats, dim=0)


def _kept(spec: LinearSpec, grouped: Codes, pairs: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the way back needs besides the packed codes and the pairs."""
    scales = grouped.scales.clone(memory_format=torch.contiguous_format)
    if grouped.scaled_zeros is None and _zeros_follow(scales):
        return {"scales": scales}
    zeros = _zeros(spec, scales, pairs)
    if grouped.scaled_zeros is None:
        return {"scales": scales} if torch.equal(zeros, grouped.zeros) else {"scales": scales, "zeros": grouped.zeros}
    scaled = grouped.scaled_zeros
    if _same_bits(_scaled_zeros(scales, zeros), scaled):
        return {"scales": scales}
    return {"scales": scales, "scaled_zeros": scaled.clone(memory_format=torch.contiguous_format)}


def _zeros_follow(scales: torch.Tensor) -> bool:
    """Whether every zero point must follow from these scales [K/g, N] and the pairs, whatever it is.

    So it is with float16 scales of which none is 0, infinite or NaN: ``(8 - zero) * scale`` is exact in float32 and far
    from the ends of bfloat16's range, and rounding to its 8 digits moves it by at most 1/64 of the scale.
    """
    if scales.dtype != torch.float16:
        return False
    least, most = torch.aminmax(scales.view(torch.int16) & 0x7FFF)
    return int(least) > 0 and int(most) < 0x7C00


def _codes(spec: LinearSpec, tensors: Mapping[str, torch.Tensor]) -> Codes:
    codes, scales = unpack_codes(tensors["packed"]), tensors["scales"]
    zeros = tensors["zeros"] if "zeros" in tensors else _zeros(spec, scales, tensors["scale_and_zero"])
    if spec.layout not in SCALED:
        return Codes(codes, zeros, scales)
    return Codes(codes, zeros, scales, tensors.get("scaled_zeros", _scaled_zeros(scales, zeros)))


def _zeros(spec: LinearSpec, scales: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The integer zero points that follow from the zero terms, uint8 [K/g, N]; 8 where the scale is 0."""
    zero_terms = pairs[:: spec.group_size // op_group(spec.group_size), :, 1].to(torch.float32)
    offsets = (zero_terms / scales.to(torch.float32)).nan_to_num_(0.0)
    return (8 - offsets.round_()).clamp_(0, 15).to(torch.uint8)


def _scaled_zeros(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """``-(scale * zero)`` as AutoAWQ writes it: in float32, rounded once, a negative zero for the zero point 0."""
    return scales.to(torch.float32).mul(zeros).neg_().to(scales.dtype)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the sign of zero (and NaN equal to itself)."""
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))
