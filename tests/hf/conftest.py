"""transformers with awq-core enabled, and dense models to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import awq_core
from awq_core.checkpoint import checkpoint_files, quantized_modules, read_headers
from awq_core.layouts import checkpoint_layout, dequantize

# Relative errors of logits that are as good as rounding allows. A bf16 kernel may round the products' sum once more.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def enabled():
    """Each test starts with awq-core enabled, and leaves transformers as it was."""
    transformers.utils.logging.disable_progress_bar()
    awq_core.enable()
    yield
    awq_core.disable()


@pytest.fixture(scope="session")
def tensors():
    """``tensors(folder)``: every tensor of a checkpoint folder by name."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for file in checkpoint_files(folder):
            safe = file.suffix == ".safetensors"
            found |= load_file(file) if safe else torch.load(file, weights_only=True)
        return found

    return read


@pytest.fixture(scope="session")
def dense(tensors, tmp_path_factory):
    """``dense(folder)``: the folder of a dense float32 model with the unpacked weights of an AWQ checkpoint."""
    made: dict[Path, Path] = {}

    def make(folder: Path) -> Path:
        if folder in made:
            return made[folder]
        stored = tensors(folder)
        config = json.loads((folder / "config.json").read_text())
        group_size = config.pop("quantization_config")["group_size"]
        weights = {}
        for name, found in quantized_modules(read_headers(checkpoint_files(folder)), group_size).items():
            parts = {s: stored.pop(f"{name}.{s}") for s in ("qweight", "qzeros", "scales")}
            layout = checkpoint_layout(found.layout)
            codes = layout.unpack(parts, found.in_features, found.out_features, found.group_size)
            weights[f"{name}.weight"] = dequantize(codes, torch.float32).T.contiguous()
        out = made[folder] = tmp_path_factory.mktemp("oracle")
        save_file({**{k: t.float() for k, t in stored.items()}, **weights}, out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        return out

    return make


@pytest.fixture(scope="session")
def load():
    """``load(folder, **options)``: ``AutoModelForCausalLM.from_pretrained``, as a user calls it."""
    return transformers.AutoModelForCausalLM.from_pretrained


@pytest.fixture(scope="session")
def ids():
    """Token ids [2, 7]."""
    return torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def assert_close():
    """``assert_close(got, wanted)``: relative to the norm, within what the dtype of ``got`` allows."""

    def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
        error = (got.float() - wanted.float()).norm() / wanted.float().norm()
        assert error <= TOLERANCE[got.dtype], f"relative error {error:.2e} in {got.dtype}"

    return check
