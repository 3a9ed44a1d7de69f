"""LoRA on AWQ linears, with PEFT's own layer for quantized weights: adapters are trained, the weights stay as they are.

``_register_custom_module`` is PEFT's experimental way to name layers that it does not know; PEFT's own AWQ support
knows the classes of one compiled package only.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from ..errors import AwqError
from ..linear import AwqLinear


def lora_config(**options: Any) -> Any:
    """``peft.LoraConfig(**options)`` that also takes AWQ linears, fused ones too, as ``target_modules``.

    An adapter cannot be merged into 4-bit weights: keep it beside them, or ``model.dequantize()`` first.

    Raises:
        AwqError: PEFT is not installed, or is a version without what this needs.
    """
    from .fusing import reader

    config, layer = _peft(**options)
    config._register_custom_module({AwqLinear: layer, reader(): layer})
    return config


def _peft(**options: Any) -> tuple[Any, type]:
    try:
        from peft import LoraConfig
        from peft.tuners.lora.awq import AwqLoraLinear
    except ImportError as error:
        raise AwqError(f"LoRA needs PEFT 0.18 or later: pip install peft ({error})") from error
    config = LoraConfig(**options)
    if not hasattr(config, "_register_custom_module"):
        raise AwqError("this PEFT cannot be told of AWQ linears: install peft 0.18 or later")
    return config, _layer(AwqLoraLinear)


@functools.cache
def _layer(base: type) -> type:
    def init(self: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        # PEFT asks the weight's own tensor where it lies: checkpoint tensors come back until the first forward.
        owner = target if isinstance(target, AwqLinear) else getattr(target, "joined", None)
        if isinstance(owner, AwqLinear):
            owner.weight_state.unbind()
        with warnings.catch_warnings():
            # PEFT reads in_features and out_features of a class that it does not know, and warns of it.
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            base.__init__(self, target, *args, **kwargs)  # type: ignore[misc]

    return type("AwqLoraLinear", (base,), {"__init__": init, "__module__": __name__})
