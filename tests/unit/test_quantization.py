"""Round to nearest against a formula written element by element, and the writer of checkpoint folders."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from awq_core import CheckpointError
from awq_core.layouts import dequantize
from awq_core.quantization import write
from awq_core.quantization.rtn import quantize_weight
from awq_core.quantization.write import ShardWriter, copy_side_files, new_folder


def naive(weight: torch.Tensor, group_size: int, zero_point: bool, dtype: torch.dtype):
    """(codes [K, N], zeros [K/g, N], scales [K/g, N]) by plain loops."""
    n, k = weight.shape
    codes, zeros = torch.zeros(k, n, dtype=torch.uint8), torch.zeros(k // group_size, n, dtype=torch.uint8)
    scales = torch.zeros(k // group_size, n, dtype=dtype)
    for row in range(n):
        for group in range(k // group_size):
            part = weight[row, group * group_size : (group + 1) * group_size].float()
            if zero_point:
                low, high = min(part.min(), torch.tensor(0.0)), max(part.max(), torch.tensor(0.0))
                scale = max((high - low) / 15, torch.tensor(1e-5)).to(dtype)
                zero = torch.round(-low / scale.float()).clamp(0, 15)
            else:
                scale = max(part.abs().max() / 7, torch.tensor(1e-5)).to(dtype)
                zero = torch.tensor(8.0)
            scales[group, row], zeros[group, row] = scale, int(zero)
            for i, value in enumerate(part):
                code = torch.round(value / scale.float()) + zero
                codes[group * group_size + i, row] = int(code.clamp(0, 15))
    return codes, zeros, scales


@pytest.mark.parametrize("zero_point", [True, False], ids=["zero point", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codes_are_those_of_the_formula(zero_point, dtype):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :32] = 0
    weight[1, :32] = 0.7  # constant
    weight[2, 32:] = weight[2, 32:].abs() + 1  # no zero inside the range
    weight[3, :32] *= 1e-4
    before = weight.clone()
    codes = quantize_weight(weight, 32, zero_point)
    wanted = naive(weight, 32, zero_point, torch.float16)
    assert torch.equal(weight, before)
    for found, right in zip((codes.codes, codes.zeros, codes.scales), wanted, strict=True):
        assert found.is_contiguous()
        assert found.dtype == right.dtype
        assert torch.equal(found, right)


def test_error_is_at_most_half_a_step():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    codes = quantize_weight(weight, 32, scales_dtype=torch.float32)
    error = (dequantize(codes, torch.float32).T - weight).abs()
    # The rounding of the zero point can push the end of a range out by half a step more.
    assert bool((error <= codes.scales.T.repeat_interleave(32, 1) * 1.0001).all())
    assert bool((error.mean() <= codes.scales.mean() / 3).all())


def test_one_group_a_column():
    assert quantize_weight(torch.randn(8, 48), 48).scales.shape == (1, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_has_no_code_is_an_error(value, dtype):
    weight = torch.ones(8, 64, dtype=dtype)
    weight[3, 40] = value
    with pytest.raises(CheckpointError, match="NaN or inf"):
        quantize_weight(weight, 32)


def test_scales_beyond_float16():
    with pytest.raises(CheckpointError, match=r"too large: its scales do not fit torch\.float16"):
        quantize_weight(torch.full((8, 32), 3e38), 32)
    assert quantize_weight(torch.full((8, 32), 3e38), 32, scales_dtype=torch.bfloat16).scales.isfinite().all()


def test_new_folder(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.ENOSPC, "full")], ids=repr)
@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
def test_an_interrupted_run_leaves_nothing_and_changes_nothing(tmp_path, error, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "old").write_text("old")
    wanted = CheckpointError if isinstance(error, OSError) else type(error)

    def run():
        with new_folder(out, overwrite=True) as folder:
            (folder / "new").write_text("new")
            raise error

    with pytest.raises(wanted):
        run()
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["old", "out"] if there else [])


def test_overwrite_replaces_the_whole_folder(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(CheckpointError, match="exists already"), new_folder(out):
        pass
    with new_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["new", "out"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "out" / "new").is_file()


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = write.Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(write.Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"), new_folder(out, overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "out"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("... No space left on device ...")]
)
def test_a_full_disk(tmp_path, monkeypatch, error):
    def save_file(*args, **kwargs):
        raise error

    monkeypatch.setattr(write, "save_file", save_file)

    def run():
        with new_folder(tmp_path / "out") as folder:
            writer = ShardWriter(folder, 1000)
            writer.add("a", torch.zeros(4))
            writer.close()

    with pytest.raises(CheckpointError, match="out was not written: the disk is full"):
        run()
    assert not list(tmp_path.iterdir())


def test_shards_and_their_index(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}  # 40 bytes each
    writer = ShardWriter(tmp_path, 100)
    for name, tensor in tensors.items():
        writer.add(name, tensor.view(5, 2).T.T.view(10))
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == names
    assert index["metadata"] == {"total_size": 200}
    assert [index["weight_map"][name] for name in tensors] == [names[0], names[0], names[1], names[1], names[2]]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_one_file_has_no_index(tmp_path):
    writer = ShardWriter(tmp_path, 10)
    writer.add("big", torch.zeros(100))  # a tensor above the limit gets a file of its own
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_side_files_are_copied_but_no_weights(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ["tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    for name in [*kept, "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]:
        source.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    target.mkdir()
    copy_side_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(kept)
