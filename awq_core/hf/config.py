"""AwqConfig: transformers' class with the options back that version 5 drops.

Two faces in one class, as in transformers 4: ``AwqConfig(...)`` is what a user asks for, ``AwqConfig.from_dict(...)``
what a checkpoint says. ``from_pretrained`` merges the first into the second by ``get_loading_attributes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import CheckpointConfig
from ..options import UserOptions
from ._compat import AwqConfig as StockAwqConfig
from ._compat import QuantizationMethod

METHODS = (
    "__init__",
    "__repr__",
    "__eq__",
    "from_dict",
    "to_dict",
    "to_diff_dict",
    "get_loading_attributes",
    "post_init",
)


class AwqConfig(StockAwqConfig):  # type: ignore[misc]
    """How to run an AWQ checkpoint: every option of transformers 4, checked.

    Args:
        bits, group_size, zero_point: what the checkpoint has; its own values win.
        version: backend to force (``gemm``, ``gemv``, ``exllama``, ``cpu`` or a third party's name); None lets
            the dispatcher choose the fastest.
        backend: ``autoawq`` or ``llm-awq``, accepted for old code.
        do_fuse, fuse_max_seq_len, modules_to_fuse: fused modules.
        modules_to_not_convert: accepted; the checkpoint's header decides.
        exllama_config: ``{"version": 2, "max_input_len": 2048, "max_batch_size": 8}``.

    Raises:
        ConfigError: (a ValueError) one sentence, for anything that breaks a rule, unknown options included.
    """

    def __init__(self, *in_order: Any, **options: Any) -> None:
        self.quant_method = QuantizationMethod.AWQ
        self.options = UserOptions(**dict(zip(UserOptions.model_fields, in_order, strict=False)), **options)
        self.checkpoint: CheckpointConfig | None = None
        _set_attributes(self)

    def post_init(self) -> None:
        """Nothing is left to check."""

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:  # the signature is transformers'
        """The config of a checkpoint, from its ``quantization_config`` as it stands; unknown keys are kept."""
        config = cls.__new__(cls)
        config.quant_method = QuantizationMethod.AWQ
        config.options = UserOptions()
        config.checkpoint = CheckpointConfig.from_dict(config_dict)
        _set_attributes(config)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What is written to a checkpoint: the keys that were read, or the options that describe one."""
        if self.checkpoint is not None:
            return self.checkpoint.to_dict()
        named = {key: getattr(self, key) for key in ("bits", "group_size", "zero_point", "modules_to_not_convert")}
        return named | {"quant_method": "awq"}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as ``to_dict``: nothing is left out of a checkpoint's own words."""
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained`` carries over onto the checkpoint's config."""
        return {"options": self.options}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StockAwqConfig) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"AwqConfig {self.to_dict()}, asked for: {self.options}"


def _set_attributes(config: AwqConfig) -> None:
    """Plain attributes, for code that reads them off ``model.config.quantization_config``."""
    said = config.checkpoint if config.checkpoint is not None else config.options
    for name in ("bits", "group_size", "zero_point", "modules_to_not_convert", "version", "backend"):
        setattr(config, name, getattr(said, name))
    for name in ("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"):
        setattr(config, name, getattr(config.options, name))
