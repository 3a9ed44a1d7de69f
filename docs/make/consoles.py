"""Sessions in the pages: each ``$ awq ...`` of a block marked ``<!-- made -->`` is run, and its output put below it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from awq_core.cli import _device, app
from awq_core.layouts import checkpoint_layout
from awq_core.spec import Device
from awq_core.testing.tiny import tiny_checkpoint

MARKED = re.compile(r"(<!-- made -->\n+```console\n)(.*?)(```)", re.DOTALL)
# Tables fit the page. Only what ships with awq-core is asked, so that the text is the same on every machine.
ENVIRONMENT = {"COLUMNS": "104", "AWQ_CORE_PLUGINS": "", "TERM": "dumb"}
HERE = Device.parse("cpu:avx512")  # whatever this machine is, the pages are written on this one


@contextlib.contextmanager
def folder(path: Path) -> Iterator[None]:
    """Inside ``path``, with three models.

    ``tiny`` is dense, ``tiny-awq`` its checkpoint in groups of 32, ``llama-3-8b-awq`` has the headers of a real one.
    """
    made = tiny_checkpoint(path / "made")
    made.rename(path / "tiny-awq")
    (path / "made" / "dense").rename(path / "tiny")
    headers_only(path / "llama-3-8b-awq")
    asked = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AWQ_CORE_")}
    try:
        with contextlib.chdir(path):
            yield
    finally:
        os.environ.update(asked)


def headers_only(path: Path, layers: int = 32, g: int = 128) -> None:
    """A checkpoint of Llama-3-8B's shapes whose tensors are a hole in the file: ``awq explain`` reads no tensor."""
    linears = {"self_attn.q_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096)}
    linears |= {"self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024)}
    linears |= {"mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336), "mlp.down_proj": (14336, 4096)}
    tensors = {"model.embed_tokens.weight": ("F16", (128256, 4096)), "lm_head.weight": ("F16", (128256, 4096))}
    for layer in range(layers):
        for name, (k, n) in linears.items():
            for suffix, tensor in checkpoint_layout("gemm").shapes(k, n, g).items():
                kind = "I32" if tensor.dtypes[0] == "int32" else "F16"
                tensors[f"model.layers.{layer}.{name}.{suffix}"] = (kind, tensor.shape)
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * (4 if kind == "I32" else 2)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.mkdir()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    quantized = {"quant_method": "awq", "bits": 4, "group_size": g, "zero_point": True, "version": "gemm"}
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "quantization_config": quantized}
    (path / "config.json").write_text(json.dumps(config))


def session(text: str) -> str:
    """A block's text with every command's output as it is now; other lines are dropped."""
    parts: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            words = shlex.split(line.removeprefix("$ "))
            if words[0] != "awq":
                raise ValueError(f"only awq is run in documents, not {line!r}")
            with mock.patch.object(_device, "local_devices", return_value=[HERE]):
                result = CliRunner().invoke(app, words[1:], env=ENVIRONMENT)
            if result.exit_code not in (0, 1, 2):
                raise RuntimeError(f"{line}: {result.output}") from result.exception
            output = "\n".join(row.rstrip() for row in result.output.strip().splitlines())
            parts.append(f"{line}\n{output}\n")
    return "\n".join(parts)


def page(text: str) -> str:
    """A page with every marked block run anew."""
    return MARKED.sub(lambda found: found[1] + session(found[2]) + found[3], text)
