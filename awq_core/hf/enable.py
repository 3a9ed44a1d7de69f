"""``enable()`` and ``disable()``: what of transformers is replaced, and how it is put back.

* ``AUTO_QUANTIZER_MAPPING["awq"]`` and ``AUTO_QUANTIZATION_CONFIG_MAPPING["awq"]`` become ours.
* The methods of ``transformers.AwqConfig`` become ours in place, so that the class which was imported before
  ``enable()`` keeps the options too (it drops them without a word otherwise).
* Two functions of ``modeling_utils`` are wrapped: ``_get_dtype`` to know whether the user named a dtype, and
  ``get_hf_quantizer`` to find the config in the legacy file ``quant_config.json``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import LEGACY_FILES, read_config
from ..errors import AwqError, ConfigError
from . import _compat
from .config import METHODS, AwqConfig
from .quantizer import AwqCoreQuantizer

_undo: list[Callable[[], None]] = []


def enable() -> None:
    """Make ``from_pretrained`` load AWQ checkpoints through awq-core. Calling it again changes nothing.

    Raises:
        AwqError: where this transformers is too old, or has moved something that we touch; it names what.
    """
    if _undo:
        return
    missing = _compat.missing_names()
    if missing:
        raise AwqError(f"awq-core does not know this transformers: it lacks {', '.join(missing)}; update awq-core")
    _replace_item(_compat.QUANTIZERS, "awq", AwqCoreQuantizer)
    _replace_item(_compat.CONFIGS, "awq", AwqConfig)
    for name in METHODS:
        _replace_attribute(_compat.AwqConfig, name, AwqConfig.__dict__[name])
    _replace_attribute(_compat.modeling_utils, "_get_dtype", _watch_dtype(_compat.modeling_utils._get_dtype))
    _replace_attribute(
        _compat.modeling_utils, "get_hf_quantizer", _find_legacy_config(_compat.modeling_utils.get_hf_quantizer)
    )


def disable() -> None:
    """Put transformers back as it was before ``enable()``."""
    while _undo:
        _undo.pop()()


def _replace_item(mapping: dict[str, Any], key: str, value: Any) -> None:
    _undo.append(functools.partial(mapping.__setitem__, key, mapping[key]))
    mapping[key] = value


def _replace_attribute(owner: Any, name: str, value: Any) -> None:
    own = owner.__dict__
    _undo.append(
        functools.partial(setattr, owner, name, own[name]) if name in own else functools.partial(delattr, owner, name)
    )
    setattr(owner, name, value)


def _watch_dtype(get_dtype: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_dtype)
    def watched(dtype: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = kwargs.get("hf_quantizer", args[-1] if args else None)
        if isinstance(quantizer, AwqCoreQuantizer):
            quantizer.dtype_named = dtype != "auto"
        return get_dtype(dtype, *args, **kwargs)

    return watched


def _find_legacy_config(get_hf_quantizer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_hf_quantizer)
    def found(config: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(config, "quantization_config", None) is None:
            legacy = _legacy_config(Path(getattr(config, "name_or_path", "") or ""))
            if legacy is not None:
                config.quantization_config = legacy
        return get_hf_quantizer(config, *args, **kwargs)

    return found


def _legacy_config(folder: Path) -> dict[str, Any] | None:
    """The AWQ config of a folder made by AutoAWQ before 0.1.8 or by llm-awq, which config.json does not mention."""
    if not folder.name or not any((folder / name).is_file() for name in LEGACY_FILES):
        return None
    try:
        raw = read_config(folder)
    except ConfigError:  # another method's file, which is not ours to load
        return None
    return {"quant_method": "awq", **raw}
