"""Models with random weights, made on their device: quantized ones without ever holding a dense weight.

They say nothing sensible, but they take the same time and memory as the real ones, and need no download.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import ConfigError
from ..experts import AwqExperts
from ..layouts import Codes, Layout, checkpoint_layout
from ..linear import AwqLinear
from ..options import UserOptions
from ..packed import PackedModule, PackedWeight
from . import fusing
from .config import AwqConfig
from .quantizer import AwqCoreQuantizer
from .skeleton import is_experts

STEP = 1 / 8  # of a scale, times 1 / sqrt(K): an output has about 0.8 of its input's magnitude, so nothing overflows


def make_config(model_type: str, sizes: dict[str, Any]) -> Any:
    """The transformers config of a model type, e.g. ``("mistral", {"hidden_size": 4096, ...})``."""
    return AutoConfig.for_model(model_type, **sizes)


def random_model(
    config: Any,
    *,
    quantized: bool,
    group_size: int = 128,
    layout: str = "gemm",
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    fuse_max_seq_len: int | None = None,
) -> Any:
    """A causal language model of ``config`` with random weights on ``device``, in eval mode, bound if quantized.

    Quantized are all linears but the output embedding, and stacked experts; a ``group_size`` that does not divide an
    in_features is a LayoutError. Codes and zero points are uniform. The embeddings and what else stays dense are drawn
    as transformers does. The same seed and device type give the same model. ``fuse_max_seq_len`` makes it a fused one.

    Raises:
        ConfigError: transformers knows no causal language model of this config.
        LayoutError, NoKernelError: ``layout`` cannot hold a shape, or no kernel runs it.
    """
    device = torch.device(device)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            raise ConfigError(f"no causal language model can be made of {type(config).__name__}: {error}") from error
        if quantized:
            _quantize(model, group_size, checkpoint_layout(layout), dtype)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        model.to_empty(device=device)
        _fill_dense(model)
        templates: dict[Any, dict[str, torch.Tensor]] = {}
        for module in model.modules():
            if isinstance(module, PackedModule):
                for weight in module.packed.values():
                    _fill(weight, templates)
        model.requires_grad_(False)
        options = UserOptions(do_fuse=fuse_max_seq_len is not None, fuse_max_seq_len=fuse_max_seq_len)
        record = fusing.join(model, options)  # as from_pretrained does: before kernels are chosen
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.bind(dtype)  # one module at a time, so that only one is held in two layouts
    if quantized:
        _mark(model, group_size, layout)
    model.eval()
    if record is not None:
        fusing.install(model, record)
    return model


def _quantize(model: Any, group_size: int, layout: Layout, dtype: torch.dtype) -> None:
    """Replace linears and experts by quantized ones (on meta, as they are)."""
    zero_point = True in layout.zero_points
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            bias = module.bias is not None
            new: nn.Module = AwqLinear(
                module.in_features, module.out_features, group_size, layout.name, bias, zero_point, dtype
            )
        elif is_experts(model, path):
            old: Any = module
            count, two_n, k = old.gate_up_proj.shape
            new = AwqExperts(count, k, two_n // 2, old.act_fn, group_size, layout.name, zero_point, dtype)
        else:
            continue
        model.set_submodule(path, new)


def _fill_dense(model: Any) -> None:
    """Draw what is dense. ``init_weights`` also computes the buffers that no checkpoint holds (rotary frequencies)."""
    for module in model.modules():
        if isinstance(module, AwqLinear) and module.bias is not None:
            module.bias.zero_()
    model.init_weights()


def _fill(weight: PackedWeight, templates: dict[Any, dict[str, torch.Tensor]]) -> None:
    """Random bits for the codes, which every layout takes; zeros and scales packed once for each shape."""
    spec, stored = weight.spec, weight.stored()
    key = (spec.in_features, spec.out_features, spec.group_size)
    if key not in templates:
        templates[key] = _template(weight)
    for suffix, tensor in stored.items():
        if suffix == "qweight":
            bits = torch.iinfo(tensor.dtype)
            tensor.random_(bits.min, bits.max)
        else:
            tensor.copy_(templates[key][suffix].to(tensor.dtype))


def _template(weight: PackedWeight) -> dict[str, torch.Tensor]:
    """Zeros and scales of one shape, in checkpoint form."""
    spec = weight.spec
    layout, device = checkpoint_layout(spec.layout), weight.device()
    groups = spec.in_features // spec.group_size
    shape = (groups, spec.out_features)
    scales = (0.5 + torch.rand(shape, device=device)) * (STEP / spec.in_features**0.5)
    symmetric = True not in layout.zero_points
    zeros = torch.full(shape, 8, device=device) if symmetric else torch.randint(0, 16, shape, device=device)
    codes = torch.zeros((spec.in_features, spec.out_features), dtype=torch.uint8, device=device)
    packed = layout.pack(Codes(codes, zeros.to(torch.uint8), scales.half()))
    return {suffix: tensor for suffix, tensor in packed.items() if suffix != "qweight"}


def _mark(model: Any, group_size: int, layout: str) -> None:
    """What ``from_pretrained`` leaves on a quantized model, so that ``generate`` and saving treat it as one."""
    version = layout if layout in ("gemm", "gemv", "gemv_fast", "marlin") else "gemm"
    said = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": layout != "marlin"}
    config = AwqConfig.from_dict(said | {"version": version})
    model.config.quantization_config = config
    model.hf_quantizer = AwqCoreQuantizer(config)
    model.is_quantized, model.quantization_method = True, config.quant_method


def count_parameters(config: Any) -> int:
    """How many weights the dense model of ``config`` has, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(tensor.numel() for tensor in model.parameters())
