"""Each fault of a checkpoint is one clear sentence of the right class, through from_pretrained."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from awq_core import CheckpointError, ConfigError, LayoutError, NoKernelError, PluginError

Q = "model.layers.0.self_attn.q_proj"
PASSED = "ignore:You passed `quantization_config`:UserWarning"


@pytest.fixture
def spoiled(checkpoint, tensors, tmp_path):
    """``spoiled(change, architecture)``: a copy of a checkpoint whose tensors ``change`` has edited in place."""

    def make(change=None, architecture="llama", config=None):
        source, folder = checkpoint(architecture), tmp_path / "spoiled"
        shutil.copytree(source, folder)
        if change is not None:
            stored = {name: tensor.clone() for name, tensor in tensors(source).items()}
            change(stored)
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            whole = json.loads((folder / "config.json").read_text())
            config(whole)
            (folder / "config.json").write_text(json.dumps(whole))
        return folder

    return make


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_truncated_file(spoiled, load):
    file = spoiled() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated, .* download it again") as error:
        load(file.parent)
    sentence(error)


@pytest.mark.parametrize("junk", [b"", b"junk", b"\xff" * 64, (16).to_bytes(8, "little") + b"{not json at all"])
def test_corrupt_header(spoiled, load, junk):
    file = spoiled() / "model.safetensors"
    file.write_bytes(junk)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(empty|truncated|not a valid)") as error:
        load(file.parent)
    sentence(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", f"{Q}.scales"), ("llama_bias", f"{Q}.bias"), ("mixtral", "model.layers.1.mlp.experts.2.w2.scales")],
)
def test_nan_and_inf(spoiled, load, tensors, checkpoint, architecture, name, value):
    name = name if name in tensors(checkpoint(architecture)) else name.replace(".mlp.", ".block_sparse_moe.")

    def change(stored):
        stored[name].view(-1)[5] = value

    with pytest.raises(CheckpointError, match=r"holds NaN or inf in 1 of .* values") as error:
        load(spoiled(change, architecture), dtype=torch.float32)
    text = sentence(error)
    assert (f"{Q}.{name.rpartition('.')[2]}" if architecture != "mixtral" else "layers.1.mlp.experts") in text


@pytest.mark.parametrize("suffix", ["scales", "qzeros"])
def test_missing_parts_are_listed(spoiled, load, suffix):
    with pytest.raises(CheckpointError, match=f"1 tensors of quantized modules are missing: {Q}.{suffix}") as error:
        load(spoiled(lambda stored: stored.pop(f"{Q}.{suffix}")))
    sentence(error)


def test_a_missing_module_is_an_error_and_not_random_numbers(spoiled, load):
    def change(stored):
        for suffix in ("qweight", "qzeros", "scales"):
            del stored[f"{Q}.{suffix}"]

    with pytest.raises(CheckpointError, match=rf"1 weights of LlamaForCausalLM are not in .*: {Q}\.weight;") as error:
        load(spoiled(change))
    sentence(error)


def test_a_module_without_a_place_in_the_model(spoiled, load):
    def change(stored):
        for suffix in ("qweight", "qzeros", "scales"):
            stored[f"model.layers.7.mlp.odd.{suffix}"] = stored[f"{Q}.{suffix}"].clone()

    with pytest.raises(CheckpointError, match=r"1 quantized modules .* have no linear .*: model\.layers\.7\.mlp\.odd"):
        load(spoiled(change))


def test_wrong_shapes(spoiled, load):
    def change(stored):
        stored[f"{Q}.scales"] = stored[f"{Q}.scales"][:, :56].contiguous()

    with pytest.raises(LayoutError, match=rf"{Q} lies in no AWQ layout .* found .* wants") as error:
        load(spoiled(change))
    assert "scales float16 [2, 56]" in sentence(error)


def test_a_weight_of_another_size_than_the_models(spoiled, load):
    def change(stored):
        for suffix in ("qweight", "qzeros", "scales"):
            stored[f"{Q}.{suffix}"] = stored["model.layers.0.mlp.up_proj." + suffix].clone()

    with pytest.raises(LayoutError, match=f"{Q} .*64.*128.*64") as error:
        load(spoiled(change))
    sentence(error)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"bits": 3}, "bits is 3, but awq-core runs 4-bit"),
        ({"group_size": 100}, "group_size is 100"),
        ({"zero_point": "yes"}, "zero_point must be True or False"),
    ],
)
def test_a_config_that_breaks_a_rule(spoiled, load, changes, match):
    with pytest.raises(ConfigError, match=match) as error:
        load(spoiled(config=lambda whole: whole["quantization_config"].update(changes)))
    sentence(error)


def test_a_gptq_checkpoint_that_says_awq(spoiled, load):
    def change(stored):
        stored[f"{Q}.g_idx"] = torch.arange(64, dtype=torch.int32)

    with pytest.raises(LayoutError, match="g_idx shows that it is a GPTQ checkpoint") as error:
        load(spoiled(change))
    sentence(error)


def test_another_method_is_not_ours_to_load(spoiled, load):
    folder = spoiled(config=lambda whole: whole["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(ImportError, match="Loading a GPTQ quantized model"):  # transformers' own words
        load(folder)


def test_a_model_that_is_not_quantized(checkpoint, load):
    from transformers import AwqConfig

    dense = checkpoint().parent / "dense"
    with pytest.raises(ConfigError, match="run `awq quantize MODEL OUT` first and load OUT") as error:
        load(dense, quantization_config=AwqConfig())
    sentence(error)
    load(dense)  # and without a word of AWQ it loads as always


def test_an_empty_folder(load, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):  # transformers' own words
        load(tmp_path)


def test_no_weights(spoiled, load):
    folder = spoiled()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named"):  # transformers' own words
        load(folder)


def test_a_state_dict_has_no_header(checkpoint, load, tensors):
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint())
    with pytest.raises(ConfigError, match="awq-core loads AWQ models from checkpoint files"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors(checkpoint()))


def test_tensor_parallel(checkpoint, load):
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint())
    config.distributed_config = object()  # what from_pretrained sets where a tp_plan is given and processes are there
    with pytest.raises(ConfigError, match="tensor parallel loading is not supported by awq-core yet") as error:
        load(checkpoint(), config=config)
    sentence(error)


@pytest.mark.filterwarnings(PASSED)
@pytest.mark.parametrize("version", ["acme", "exllama2"])
def test_a_backend_that_is_not_installed(checkpoint, load, monkeypatch, version):
    from awq_core import AwqConfig
    from awq_core.hf import quantizer

    read = []
    monkeypatch.setattr(quantizer, "read_headers", read.append)
    with pytest.raises(PluginError, match=f"backend '{version}' is not installed; installed are .*reference") as error:
        load(checkpoint(), quantization_config=AwqConfig(version=version))
    sentence(error)
    assert not read  # said before anything is loaded


@pytest.mark.filterwarnings(PASSED)
@pytest.mark.parametrize(("version", "gpu"), [("exllama", "an NVIDIA or AMD GPU"), ("rocm", "an AMD GPU")])
def test_a_backend_for_gpus_on_a_cpu(checkpoint, load, version, gpu):
    from awq_core import AwqConfig

    with pytest.raises(
        NoKernelError, match=rf'AwqConfig\(version="{version}"\) asks for .* \(it needs {gpu}\)'
    ) as error:
        load(checkpoint(), quantization_config=AwqConfig(version=version))
    assert f"{version}.rows: device: wants {gpu}, got cpu" in str(error.value)


@pytest.mark.filterwarnings(PASSED)
def test_a_forced_backend_that_refuses(toy, checkpoint, load):
    from awq_core import AwqConfig

    with pytest.raises(NoKernelError, match=r'AwqConfig\(version="toy"\) asks for backend toy, which refuses') as error:
        load(checkpoint(layout="gemv_fast"), quantization_config=AwqConfig(version="toy"))
    assert "toy.bytes: " in str(error.value)
    assert error.value.decision is not None


def experts_key(stored, ending):
    return next(name for name in stored if "experts.1." in name and name.endswith(ending))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_missing_experts_are_listed(spoiled, load, architecture):
    def change(stored):
        prefix = experts_key(stored, ".qweight").removesuffix("qweight")
        for suffix in ("qweight", "qzeros", "scales"):
            del stored[prefix + suffix]

    with pytest.raises(CheckpointError, match=r"mlp\.experts\.(gate_up|down)_proj: the checkpoint has \d quantized"):
        load(spoiled(change, architecture))


def test_an_expert_that_lacks_a_tensor(spoiled, load):
    with pytest.raises(CheckpointError, match=r"experts\.1\..*\.qzeros"):
        load(spoiled(lambda stored: stored.pop(experts_key(stored, ".qzeros")), "mixtral"))


def test_all_experts_of_a_layer_missing(spoiled, load):
    def change(stored):
        for name in [name for name in stored if "layers.1." in name and ".experts." in name]:
            del stored[name]

    with pytest.raises(CheckpointError, match="are not in the checkpoint, neither quantized nor dense") as error:
        load(spoiled(change, "mixtral"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in sentence(error)


def test_an_expert_too_many(spoiled, load):
    def change(stored):
        for name in [name for name in stored if ".experts.1." in name]:
            stored[name.replace(".experts.1.", ".experts.9.")] = stored[name].clone()

    with pytest.raises(CheckpointError, match=r"has \d+ quantized weights for it, wanted \d+"):
        load(spoiled(change, "mixtral"))


def test_experts_of_two_group_sizes(spoiled, load, checkpoint, tensors):
    other = tensors(checkpoint("mixtral", group_size=64))

    def change(stored):
        prefix = experts_key(stored, ".qweight").removesuffix("qweight")
        stored.update({prefix + s: other[prefix + s].clone() for s in ("qweight", "qzeros", "scales")})

    with pytest.raises(LayoutError, match="differ in layout or group size"):
        load(spoiled(change, "mixtral"))


def test_a_scaled_activation_that_the_model_does_not_have(spoiled, load):
    def change(stored):
        stored["model.layers.0.mlp.no_such_act.scales"] = torch.ones(128).half()

    with pytest.raises(
        CheckpointError, match=r"no_such_act\.scales scales an activation that LlamaForCausalLM does not"
    ):
        load(spoiled(change))
