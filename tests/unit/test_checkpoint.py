"""Files of a checkpoint: every fault is one CheckpointError that names the file."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from awq_core.checkpoint import (
    TensorHeader,
    check_finite,
    checkpoint_files,
    module_headers,
    quantized_modules,
    read_config,
    read_headers,
)
from awq_core.errors import CheckpointError, ConfigError, LayoutError
from awq_core.layouts import Codes, checkpoint_layout
from awq_core.layouts.detect import Detected

SHARED_PATH = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def weight(layout: str, k: int = 128, n: int = 64, g: int = 64) -> dict[str, torch.Tensor]:
    codes = Codes(
        torch.randint(0, 16, (k, n), dtype=torch.uint8),
        torch.full((k // g, n), 8, dtype=torch.uint8),
        torch.rand(k // g, n).half() + 0.01,
    )
    return checkpoint_layout(layout).pack(codes)


def model(*layouts: str, start: int = 0) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8)}
    for i, layout in enumerate(layouts, start):
        tensors |= {f"model.layers.{i}.proj.{suffix}": t for suffix, t in weight(layout).items()}
    return tensors


def raw_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_headers([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Headers


def test_headers_of_safetensors_and_bin_agree(tmp_path: Path) -> None:
    tensors = model("gemm", "llm_awq") | {
        "a.bf16": torch.zeros(2, 3, dtype=torch.bfloat16),
        "a.scalar": torch.tensor(1.0),
        "a.empty": torch.zeros(0, 4, dtype=torch.int64),
        "a.float8": torch.zeros(3, dtype=torch.float8_e4m3fn),
        "a.bool": torch.zeros(3, dtype=torch.bool),
    }
    files = [tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin", tmp_path / "old.bin"]
    save_file(tensors, files[0], metadata={"format": "pt"})
    torch.save(tensors, files[1])
    old = {name: tensor for name, tensor in tensors.items() if name != "a.float8"}  # newer than that format
    torch.save(old, files[2], _use_new_zipfile_serialization=False)
    for file, stored in zip(files, (tensors, tensors, old), strict=True):
        assert read_headers([file]) == {
            name: TensorHeader(str(t.dtype).removeprefix("torch."), tuple(t.shape), str(file))
            for name, t in stored.items()
        }


def test_truncated_at_every_length(tmp_path: Path) -> None:
    whole, cut = tmp_path / "model.safetensors", tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(4)}, whole)
    data = whole.read_bytes()
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        assert ("empty" if length == 0 else "truncated") in error_of(cut)
    cut.write_bytes(data + b"\0")
    assert "17 bytes of data where its header says 16" in error_of(cut)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\xff\xfe{}", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": 1}', "'a' is not an object"),
        (b'{"a": {}, "a": {}}', "a name stands twice"),
        ({"a": {**F32, "shape": [-2]}}, "lacks a valid"),
        ({"a": {**F32, "shape": [True, 2]}}, "lacks a valid"),
        ({"a": {**F32, "shape": None}}, "lacks a valid"),
        ({"a": {**F32, "dtype": 4}}, "lacks a valid"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, "lacks a valid"),
        ({"a": {**F32, "data_offsets": [0]}}, "lacks a valid"),
        ({"a": {**F32, "shape": [3]}}, "not the 8 bytes"),
        ({"a": {**F32, "data_offsets": [4, 12]}}, "begins at byte 4"),
        ({"a": F32, "b": F32}, "'b' begins at byte 0, not at 8"),
    ],
)
def test_corrupt_headers(tmp_path: Path, header: Any, words: str) -> None:
    assert words in error_of(raw_file(tmp_path / "x.safetensors", header, bytes(8)))


def test_a_length_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    assert "a header of 18446744073709551615 bytes" in error_of(tmp_path / "x.safetensors")


def test_unknown_dtypes_are_kept(tmp_path: Path) -> None:
    file = raw_file(tmp_path / "x.safetensors", {"a": {**F32, "dtype": "F4", "shape": [16]}}, bytes(8))
    assert read_headers([file])["a"] == TensorHeader("f4", (16,), str(file))


def test_missing_folder_and_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in error_of(tmp_path / "gone.safetensors")
    assert "no such file" in error_of(tmp_path / "gone.bin")
    assert "not a file" in error_of(tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("small")
    save_file(model("gemm"), folder / "a.safetensors")
    torch.save({"a": torch.zeros(4)}, folder / "a.bin")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@SHARED_PATH
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_the_header(small: dict[str, bytes], tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(small[".safetensors"])
    end = 8 + int.from_bytes(data[:8], "little")
    for place, value in flips:
        data[place % end] = value
    file = tmp_path / "flipped.safetensors"
    file.write_bytes(data)
    try:
        headers = read_headers([file])
    except CheckpointError:
        return
    assert all(isinstance(header, TensorHeader) for header in headers.values())


@SHARED_PATH
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes_in_a_pytorch_file(small: dict[str, bytes], tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    data = bytearray(small[".bin"])
    for place, value in flips:
        data[place % len(data)] = value
    file = tmp_path / "flipped.bin"
    file.write_bytes(data)
    try:
        headers = read_headers([file])
    except CheckpointError:
        return
    assert all(isinstance(header, TensorHeader) for header in headers.values())


def test_unsafe_truncated_and_strange_pytorch_files(tmp_path: Path) -> None:
    unsafe = tmp_path / "pytorch_model.bin"
    torch.save({"a": Path("x")}, unsafe)
    assert "convert the checkpoint to safetensors" in error_of(unsafe)
    unsafe.write_bytes(pickle.dumps({"a": print}, protocol=2))
    assert "convert the checkpoint to safetensors" in error_of(unsafe)
    torch.save([1, 2], unsafe)
    assert "holds a list" in error_of(unsafe)
    torch.save({"a": torch.zeros(100)}, unsafe)
    unsafe.write_bytes(unsafe.read_bytes()[:300])
    error_of(unsafe)


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"2\.safetensors: the tensor a is in .*1\.safetensors too"):
        read_headers(files)


# Files


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder is empty"):
        checkpoint_files(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint_files(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="not a folder"):
        checkpoint_files(tmp_path / "config.json")
    for name in ("pytorch_model.bin", "model.safetensors"):  # the second is preferred
        (tmp_path / name).write_bytes(b"x")
        assert checkpoint_files(str(tmp_path)) == [tmp_path / name]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_of_an_index(tmp_path: Path, name: str) -> None:
    index = tmp_path / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "two", "b": "one", "c": "two", "d": "three"}}))
    (tmp_path / "two").touch()
    with pytest.raises(CheckpointError, match="2 of 3 shards are missing: one, three"):
        checkpoint_files(tmp_path)
    (tmp_path / "one").touch()
    (tmp_path / "three").touch()
    assert checkpoint_files(tmp_path) == [tmp_path / shard for shard in ("one", "three", "two")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "has to hold a JSON object, got list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "../secret"}}', "not the name of a file in this folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "not the name of a file in this folder"),
    ],
)
def test_broken_indices(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        checkpoint_files(tmp_path)


# Modules


def headers_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorHeader]:
    return {
        n: TensorHeader(str(t.dtype).removeprefix("torch."), tuple(t.shape), "f.safetensors")
        for n, t in tensors.items()
    }


def test_quantized_modules_over_shards(tmp_path: Path) -> None:
    first, second = model("gemm", "gemv", "marlin"), model("gemv_fast", "llm_awq", start=3)
    del second["model.norm.weight"]
    second["model.layers.3.proj.bias"] = torch.zeros(64)
    first["model.act.scales"] = torch.ones(64)  # ScaledActivation: scales without a qweight
    # A module may be cut by a shard's border.
    second["model.layers.2.proj.scales"] = first.pop("model.layers.2.proj.scales")
    first["model.block.experts.3.w1.qweight"] = torch.zeros(1)
    for name in [name for name in first if "experts" in name]:
        del first[name]
    first |= {f"model.block.experts.3.w1.{suffix}": t for suffix, t in weight("gemm").items()}
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file(first, files[0])
    save_file(second, files[1])
    headers = read_headers(files)
    modules = quantized_modules(headers, 64, {"model.layers.0.proj": (128, 64)})
    want = {
        f"model.layers.{i}.proj": layout for i, layout in enumerate(("gemm", "gemv", "marlin", "gemv_fast", "llm_awq"))
    }
    want["model.block.experts.3.w1"] = "gemm"
    assert modules == {
        name: Detected(layout, 128, 64, 64, name == "model.layers.3.proj") for name, layout in want.items()
    }
    assert set(module_headers(headers)["model.layers.3.proj"].tensors) == {"qweight", "qzeros", "scales", "bias"}


def test_a_model_without_quantized_modules() -> None:
    assert quantized_modules(headers_of({"lm_head.weight": torch.zeros(2, 2)}), 128) == {}


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm_awq", "marlin"])
def test_missing_companions_are_listed(layout: str) -> None:
    complete = headers_of(model(layout))
    prefix = "model.layers.0.proj."
    zeros = {"marlin": set(), "llm_awq": {"scaled_zeros"}}.get(layout, {"qzeros"})
    for suffix in {"scales", *zeros}:
        some = {name: header for name, header in complete.items() if name != prefix + suffix}
        named = "qzeros" if suffix == "scaled_zeros" else suffix
        with pytest.raises(CheckpointError, match=rf"f\.safetensors: 1 tensors .* missing: {prefix}{named};"):
            quantized_modules(some, 64)
    if zeros:
        with pytest.raises(CheckpointError, match=f"missing: {prefix}qweight;"):
            quantized_modules({n: h for n, h in complete.items() if n != prefix + "qweight"}, 64)


def test_many_missing_companions_are_counted() -> None:
    some = {n: h for n, h in headers_of(model(*["gemm"] * 7)).items() if not n.endswith(".scales")}
    with pytest.raises(CheckpointError, match=r"7 tensors .*layers\.4\.proj\.scales and 2 more; is the download"):
        quantized_modules(some, 64)


def test_bad_modules_are_listed_up_to_five() -> None:
    headers = headers_of(model(*["gemm"] * 8))
    bad = TensorHeader("float16", (2, 63), "f.safetensors")
    one = headers | {"model.layers.6.proj.scales": bad}
    with pytest.raises(LayoutError, match=r"^f\.safetensors: model\.layers\.6\.proj lies in no AWQ layout"):
        quantized_modules(one, 64)
    with pytest.raises(LayoutError) as caught:
        quantized_modules(headers | {f"model.layers.{i}.proj.scales": bad for i in range(7)}, 64)
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 of 8 quantized modules cannot be read:"
    assert len(lines) == 7
    assert lines[-1].strip() == "and 2 more"


def test_check_finite() -> None:
    scales = torch.ones(4, 4, dtype=torch.float16)
    check_finite("m.scales", scales)
    check_finite("m.qweight", torch.zeros(2, dtype=torch.int32))
    check_finite("m.scales", torch.empty(4, device="meta"))
    scales[0, 0], scales[1, 1] = float("nan"), float("inf")
    with pytest.raises(CheckpointError, match=r"^f\.safetensors: m\.scales holds NaN or inf in 2 of 16 values"):
        check_finite("m.scales", scales, "f.safetensors")
    with pytest.raises(CheckpointError, match=r"^m\.scales holds"):
        check_finite("m.scales", scales)


# Config

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}


def config(folder: Path, name: str = "config.json", **keys: Any) -> Path:
    (folder / name).write_text(json.dumps(keys))
    return folder


def test_where_the_config_lies(tmp_path: Path) -> None:
    legacy = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}
    config(tmp_path, model_type="llama", quantization_config=None)
    config(tmp_path, "quantize_config.json", **{**legacy, "version": "gemv"})
    assert read_config(tmp_path)["version"] == "gemv"
    config(tmp_path, "quant_config.json", **legacy)
    assert read_config(tmp_path) == legacy
    config(tmp_path, text_config={"quantization_config": AWQ})
    assert read_config(str(tmp_path)) == AWQ
    config(tmp_path, quantization_config={**AWQ, "bits": 3}, text_config={"quantization_config": AWQ})
    assert read_config(tmp_path) == {**AWQ, "bits": 3}


def test_configs_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_config(tmp_path / "gone")
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"not quantized.*run `awq quantize MODEL OUT`"):
        read_config(config(tmp_path, model_type="llama"))
    with pytest.raises(CheckpointError, match="quantization_config is a list"):
        read_config(config(tmp_path, quantization_config=[1]))
    for method in ("gptq", "compressed-tensors"):
        with pytest.raises(ConfigError, match=f"this is a {method} checkpoint"):
            read_config(config(tmp_path, quantization_config={"quant_method": method, "bits": 4}))
    config(tmp_path, "quantize_config.json", bits=4, group_size=128, desc_act=False)
    with pytest.raises(ConfigError, match="this is a gptq checkpoint"):
        read_config(config(tmp_path, model_type="llama"))
