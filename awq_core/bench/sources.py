"""What is measured: a named configuration or a folder, as the variants unfused, fused and dense."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint import checkpoint_files, is_quantized
from .models import named_config, random_awq_model, random_dense_model

Variant = Literal["unfused", "fused", "dense"]


@dataclass(frozen=True)
class Named:
    """A known configuration with random weights."""

    name: str
    layers: int | None = None
    group_size: int = 128
    layout: str = "gemm"
    quantized = True

    @property
    def config(self) -> Any:
        """The transformers config."""
        return named_config(self.name, self.layers)

    def describe(self) -> str:
        """In words."""
        cut = "" if self.layers is None else f" cut to {self.layers} layers"
        return f"{self.name}{cut}, random weights, g{self.group_size}"

    def make(self, variant: Variant, device: torch.device, dtype: torch.dtype, max_seq_len: int) -> Any:
        """The model of one variant."""
        if variant == "dense":
            return random_dense_model(self.config, dtype=dtype, device=device)
        return random_awq_model(
            self.config,
            group_size=self.group_size,
            layout=self.layout,
            dtype=dtype,
            device=device,
            fuse_max_seq_len=max_seq_len if variant == "fused" else None,
        )


@dataclass(frozen=True)
class Folder:
    """A checkpoint folder; its dense variant has the same shapes and random weights, unless the folder is dense."""

    path: Path
    config: Any
    quantized: bool

    @classmethod
    def open(cls, path: Path) -> Folder:
        """CheckpointError where ``path`` is no model folder, ConfigError where another method quantized it."""
        from ..hf.loading import read_model_config

        checkpoint_files(path)
        quantized = is_quantized(path)
        return cls(path, read_model_config(path), quantized)

    def describe(self) -> str:
        """In words."""
        return f"{self.path}" + (" (dense: the same shapes with random weights)" if self.quantized else "")

    def make(self, variant: Variant, device: torch.device, dtype: torch.dtype, max_seq_len: int) -> Any:
        """The model of one variant."""
        from ..hf.loading import load_model

        if variant == "dense" and self.quantized:
            return random_dense_model(self.config, dtype=dtype, device=device)
        return load_model(self.path, dtype, device, max_seq_len if variant == "fused" else None)


Source = Named | Folder


def dense_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the dense model's weights."""
    from ..hf.random_weights import count_parameters

    return count_parameters(config) * dtype.itemsize


def forget(device: torch.device) -> None:
    """Give the memory of deleted models back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
