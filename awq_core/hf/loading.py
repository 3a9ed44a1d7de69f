"""Loading a model for measuring: no tokenizer is asked for, and every failure is one sentence."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from ..errors import AwqError, CheckpointError
from .config import AwqConfig
from .enable import enable


def read_model_config(folder: Path) -> Any:
    """The transformers config in ``folder`` as that of the dense model; CheckpointError where there is none."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder} has no config.json that transformers can load: {_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_model(folder: Path, dtype: torch.dtype, device: torch.device, fuse_max_seq_len: int | None = None) -> Any:
    """The model in ``folder``, dense or AWQ, by plain ``from_pretrained``; fused where a length is given.

    Raises:
        CheckpointError: transformers cannot load the folder; its own reason is part of the sentence.
    """
    enable()
    if not sys.stderr.isatty():
        disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "device_map": str(device)}
    if fuse_max_seq_len is not None:
        options["quantization_config"] = AwqConfig(do_fuse=True, fuse_max_seq_len=fuse_max_seq_len)
    try:
        with warnings.catch_warnings():
            # That the request is merged into the checkpoint's config is what we want.
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except AwqError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {_line(error)}") from error


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
