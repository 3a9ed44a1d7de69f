"""Every name of transformers that we rely on and that its documentation does not promise, once.

``tests/hf/test_contract.py`` pins that each exists and behaves as we use it, so that a release that moves one is named
by one failing test.
"""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from transformers import modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import AwqConfig, QuantizationConfigMixin, QuantizationMethod

MINIMUM = "5.17"

CONFIGS = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
QUANTIZERS = auto.AUTO_QUANTIZER_MAPPING

__all__ = [
    "CONFIGS",
    "MINIMUM",
    "QUANTIZERS",
    "AwqConfig",
    "Concatenate",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "QuantizationMethod",
    "WeightConverter",
    "WeightRenaming",
    "converter_like",
    "get_model_conversion_mapping",
    "missing_names",
    "modeling_utils",
    "rename_source_key",
]


def converter_like(converter: Any, sources: list[str], target: str, operations: list[Any]) -> Any:
    """A converter of the same scope with other patterns (``WeightConverter.copy`` is not in transformers 5.17)."""
    made = WeightConverter(sources, [target], operations)
    for name in ("scope_prefix", "base_model_prefix", "force_cpu"):
        if hasattr(converter, name):
            setattr(made, name, getattr(converter, name))
    return made


def missing_names() -> list[str]:
    """What this transformers lacks of the things that ``enable()`` touches; empty where all is as we know it."""
    problems: list[str] = []
    if Version(transformers.__version__) < Version(MINIMUM):
        problems.append(f"transformers {MINIMUM} or later (found {transformers.__version__})")
    if "awq" not in CONFIGS:
        problems.append('AUTO_QUANTIZATION_CONFIG_MAPPING["awq"]')
    if "awq" not in QUANTIZERS:
        problems.append('AUTO_QUANTIZER_MAPPING["awq"]')
    problems += [
        f"transformers.modeling_utils.{name}"
        for name in ("_get_dtype", "get_hf_quantizer")
        if not hasattr(modeling_utils, name)
    ]
    return problems
