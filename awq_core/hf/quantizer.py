"""The quantizer that transformers calls while ``from_pretrained`` runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import plugins
from ..checkpoint import check_finite, quantized_modules, read_headers
from ..errors import ConfigError
from ..experts import AwqExperts
from ..layouts import checkpoint_layout
from ..layouts.detect import reconcile_version
from ..linear import AwqLinear
from ..notice import tell
from ..options import UserOptions
from ..packed import PackedModule
from ..request import Request, current_request
from . import _compat, fusing
from .scaled_activation import ScaledActivation
from .skeleton import build, expected_shapes


class AwqCoreQuantizer(_compat.HfQuantizer):  # type: ignore[misc]
    """Builds quantized modules from the checkpoint's header, and binds them where they came to lie."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigError(
                "this model is not quantized, and from_pretrained does not quantize with AWQ: "
                "run `awq quantize MODEL OUT` first and load OUT"
            )
        super().__init__(quantization_config, **kwargs)
        self.dtype_named = True
        self._device_map: Any = None
        self._dtype: torch.dtype | None = None
        self._experts: dict[str, str] = {}  # layout of each stacked weight
        self._compile_safe = True

    @property
    def options(self) -> UserOptions:
        """What the user asked for."""
        options = self.quantization_config.options
        assert isinstance(options, UserOptions)
        return options

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Remember the device map (transformers calls this twice, first as given, then resolved)."""
        self._device_map = kwargs.get("device_map")
        for note in (*self.options.notes, *self.quantization_config.checkpoint.notes):
            tell(note)
        request = current_request(self.options.request)
        if request.forced is not None:
            plugins.registry().backend(request.forced)  # PluginError now, not after the weights are read

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that was asked for; bfloat16 where none was, the file says float16 and the model goes to a CPU."""
        if not self.dtype_named and dtype == torch.float16 and _goes_to_cpu(self._device_map):
            tell(
                "on a CPU an AWQ model runs in bfloat16, which is fast there; pass dtype=torch.float16 to keep float16"
            )
            return torch.bfloat16
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if not checkpoint_files:
            raise ConfigError(
                "awq-core loads AWQ models from checkpoint files; a state_dict alone has no header to read"
            )
        config = self.quantization_config.checkpoint
        headers = read_headers([Path(file) for file in checkpoint_files])
        modules = quantized_modules(headers, config.group_size, expected_shapes(model, headers))
        for found in modules.values():
            note = reconcile_version(config.version, config.backend, found.layout)
            for text in (note, *found.notes):
                if text:
                    tell(text)
        build(model, modules, headers, config.zero_point, dtype or model.config.dtype)
        fusing.check(model, self.options)
        self._dtype = dtype or model.config.dtype
        self._experts = {
            f"{path}.{part}": weight.spec.layout
            for path, module in model.named_modules()
            if isinstance(module, AwqExperts)
            for part, weight in module.packed.items()
        }

    def update_parallel_plan(self, model: Any, plan: Any) -> None:
        """Tensor parallelism would cut words in two."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise ConfigError("tensor parallel loading is not supported by awq-core yet: load without tp_plan")

    def update_weight_conversions(self, conversions: list[Any], model: Any = None) -> list[Any]:
        """Let the converters that join expert weights join their quantized tensors too, on the axis of N."""
        layouts = self._experts  # known before; transformers 5.17 does not pass the model
        added: list[Any] = []
        for converter in conversions:
            if not isinstance(converter, _compat.WeightConverter) or len(converter.target_patterns) != 1:
                continue
            sources, target = converter._original_source_patterns, converter._original_target_patterns[0]
            names = [layout for path, layout in layouts.items() if path.endswith(target.lstrip("."))]
            if not names or not all(source.endswith(".weight") for source in sources):
                continue
            axes = checkpoint_layout(names[0]).out_axis
            for suffix, axis in axes.items():
                operations = [
                    _compat.Concatenate(dim=axis + 1) if isinstance(op, _compat.Concatenate) else op
                    for op in converter.operations
                ]
                renamed = [source.removesuffix("weight") + suffix for source in sources]
                added.append(_compat.converter_like(converter, renamed, f"{target}_{suffix}", operations))
        return [*added, *conversions]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        request = current_request(self.options.request)
        dtype = self._dtype or model.dtype
        for name, module in model.named_modules():
            if isinstance(module, PackedModule | ScaledActivation):
                _check_loaded(name, module)
            else:
                _cast_dense(module, dtype)
        record = fusing.join(model, self.options)  # before kernels are chosen, so that no weight is prepared twice
        packed = [module for module in model.modules() if isinstance(module, PackedModule)]
        _bind_all(packed, dtype, request)
        self._compile_safe &= all(plan.compile_safe for module in packed for plan in module.plans.values())
        if record is not None:
            fusing.install(model, record)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if getattr(model, "awq_fused", None) is not None:
            model.unfuse()
        for name, module in list(model.named_modules()):
            if isinstance(module, AwqExperts):
                raise NotImplementedError(f"{name}: quantized experts cannot be made dense yet")
            if isinstance(module, AwqLinear):
                weight = module.dequantize(dtype)
                dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                dense.weight = nn.Parameter(weight.contiguous())
                if module.bias is not None:
                    dense.bias = nn.Parameter(module.bias.detach().to(weight.dtype))
                model.set_submodule(name, dense)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Always: checkpoint bytes are written, whatever is bound."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained: the linears pass a gradient to their input."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether every bound kernel may run in a compiled graph; all are called by one op with a fake."""
        return self._compile_safe


def _cast_dense(module: nn.Module, dtype: torch.dtype) -> None:
    """Give the module's own dense tensors the model's dtype: transformers 5.17 leaves those that it renamed as stored.

    float32 tensors stay: a model may keep some so on purpose.
    """
    for tensor in module.parameters(recurse=False):
        if tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float32) and tensor.device.type != "meta":
            tensor.data = tensor.data.to(dtype)


def _goes_to_cpu(device_map: Any) -> bool:
    """Whether a model with this device map ends on the CPU (with None too, unless a GPU waits for it)."""
    if device_map is None or device_map in ("auto", "balanced", "sequential", "balanced_low_0"):
        return not torch.accelerator.is_available()
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(str(place) in ("cpu", "disk") for place in places)


def _check_loaded(name: str, module: nn.Module) -> None:
    """CheckpointError where a tensor holds NaN or inf; the loader's ``requires_grad`` is taken off codes and scales."""
    for suffix, tensor in module.named_parameters(recurse=False):
        check_finite(f"{name}.{suffix}", tensor)
        if suffix != "bias":
            tensor.requires_grad_(False)


MOST_BINDING = 8  # modules that are repacked at once: each holds a copy or two of its weight meanwhile


def _bind_all(modules: list[PackedModule], dtype: torch.dtype, request: Request) -> None:
    """Bind loaded modules; those on the CPU one per thread at a time: repacking is operations too short to share."""
    threads = torch.get_num_threads()
    if any(weight.device().type != "cpu" for module in modules for weight in module.packed.values()):
        for module in modules:
            _bind(module, dtype, request)
        return
    # A thread's number of threads is its own, but a new thread starts with the one that was set last.
    try:
        with ThreadPoolExecutor(min(threads, MOST_BINDING), "awq-bind", torch.set_num_threads, (1,)) as pool:
            list(pool.map(lambda module: _bind(module, dtype, request), modules))
    finally:
        torch.set_num_threads(threads)


def _bind(module: PackedModule, dtype: torch.dtype, request: Request) -> None:
    """Bind a loaded module; under an offloading hook, for the device of execution."""
    hook = getattr(module, "_hf_hook", None)
    offloaded = bool(getattr(hook, "offload", False))
    place = torch.device(hook.execution_device) if offloaded and hook is not None else None
    module.bind(dtype, request, on=place)
