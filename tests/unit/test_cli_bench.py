from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from awq_core import ConfigError
from awq_core.bench import machine
from awq_core.bench.loops import Case
from awq_core.bench.measure import Speed
from awq_core.bench.models import CONFIGS
from awq_core.bench.run import Made, Report, Row
from awq_core.cli import app
from awq_core.cli._bench_tables import guide_cells, print_report
from awq_core.cli.bench import make_cases, numbers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GUIDE = "Batch Size   Prefill Length   Decode Length   Prefill tokens/s   Decode tokens/s   Memory"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "small", ("llama", SIZES))
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)


def awq(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def refused(*args: object) -> str:
    result = awq(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").strip()


def measured(*args: object) -> Any:
    given = ("--group-size", 32, "--device", "cpu", "--dtype", "float32", "--repeats", 1, "--prefill", 8, "--decode", 4)
    result = awq("bench", *given, *args)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_json_has_the_raw_loop_and_the_floor() -> None:
    found = json.loads(measured("--config", "small", "--batch-size", "1,2", "--json"))
    assert [(r["variant"], r["batch_size"], r["prefill_length"], r["decode_length"]) for r in found["rows"]] == [
        (variant, batch, 8, 4) for variant in ("unfused", "fused", "dense") for batch in (1, 2)
    ]
    for line in found["rows"]:
        assert line["prefill_tokens_per_second"] == pytest.approx(line["batch_size"] * 8 / line["prefill_seconds"])
        assert line["decode_loop_tokens_per_second"] == pytest.approx(
            line["batch_size"] * 4 / line["decode_loop_seconds"]
        )
        assert line["floor_tokens_per_second"] > 0
        assert line["memory_bytes"] > 0
    assert found["source"] == "small, random weights, g32"
    assert found["plots"] == found["notes"] == []
    assert set(found["bandwidth_bytes_per_second"]) == {"read", "copy"}


@pytest.mark.parametrize(
    ("options", "variants"),
    [
        (("--fused", "--no-dense"), ["fused"]),
        (("--no-fused", "--no-dense"), ["unfused"]),
        (("--no-fused",), ["unfused", "dense"]),
    ],
)
def test_variants_are_chosen(options: tuple[str, ...], variants: list[str]) -> None:
    found = json.loads(measured("--config", "small", "--json", *options))
    assert [line["variant"] for line in found["rows"]] == variants


def test_a_checkpoint_is_measured_and_drawn(checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint("llama", method="rtn")
    shown = measured(folder, "--batch-size", 1, "--batch-size", 2, "--plot", tmp_path)
    assert [title for title in ("Unfused module", "Fused module", "Dense model") if title in shown] == [
        "Unfused module", "Fused module", "Dense model",
    ]  # fmt: skip
    assert shown.count(f"{GUIDE} (RAM)") == 3
    assert "Decode tokens/s side by side" in shown
    assert "fused / unfused" in shown
    assert str(folder) in shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["forward_memory.png", "generate_throughput.png"]
    dense = json.loads(measured(folder.parent / "dense", "--json"))
    assert [line["variant"] for line in dense["rows"]] == ["dense"]


def test_what_is_refused(tmp_path: Path, checkpoint: Any) -> None:
    assert "one of the two" in refused("bench")
    assert "one of the two" in refused("bench", tmp_path, "--config", "small")
    assert "no configuration called 'gpt-5'" in refused("bench", "--config", "gpt-5")
    assert refused("bench", tmp_path / "no") == f"{tmp_path / 'no'}: no such folder"
    assert "--layers cuts a --config" in refused("bench", checkpoint("llama", method="rtn"), "--layers", 1)
    assert "'x' is not a positive number" in refused("bench", "--config", "small", "--prefill", "8,x")
    assert "no such GPU" in refused("bench", "--config", "small", "--device", "cuda:77")
    assert "64 positions" in refused("bench", "--config", "small", "--device", "cpu", "--prefill", 64)
    assert "does not divide" in refused(
        "bench", "--config", "small", "--device", "cpu", "--prefill", 8, "--group-size", 48
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{]")
    assert "not valid JSON" in refused("bench", tmp_path)
    assert "is a file" in refused("bench", "--config", "small", "--plot", tmp_path / "config.json")


def test_without_matplotlib_a_sentence_comes_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused("bench", "--config", "small", "--plot", tmp_path)
    assert said == "charts need matplotlib: pip install 'awq-core[plot]'"


def test_matplotlib_is_imported_for_charts_only() -> None:
    code = "import sys, awq_core.bench.run, awq_core.bench.plots; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_numbers() -> None:
    assert numbers("--x", None) == []
    assert numbers("--x", ["1, 2", "8"]) == [1, 2, 8]
    for wrong in ("0", "-1", "1.5", "", "1,,2", "²"):
        with pytest.raises(ConfigError, match="--x"):
            numbers("--x", [wrong])


def test_lengths_go_in_pairs() -> None:
    assert make_cases([1, 4], [32, 64], [], True, None) == [Case(b, n, n) for b in (1, 4) for n in (32, 64)]
    assert make_cases([1], [32, 64], [5], True, None) == [Case(1, 32, 5), Case(1, 64, 5)]
    assert make_cases([1], [32, 64], [5, 6], True, None) == [Case(1, 32, 5), Case(1, 64, 6)]
    assert [case.prefill for case in make_cases([1], [], [], False, None)] == [32, 64, 128, 256, 512, 1024, 2048]
    assert [case.prefill for case in make_cases([1], [], [], False, 2048)] == [32, 64, 128, 256, 512]
    assert [case.prefill for case in make_cases([1], [], [], True, None)] == [32, 64, 128]
    with pytest.raises(ConfigError, match="--decode has 3 numbers for 2 prompt lengths"):
        make_cases([1], [32, 64], [1, 2, 3], True, None)


def report(*rows: Row, **options: Any) -> Report:
    given = {"total_memory": 85_000_000_000, "bandwidth": machine.Bandwidth(2.5e12, 3e12), "on_gpu": True}
    return Report("small", "a GPU", "float16", rows=rows, **(given | options))


def row(variant: Any, rate: float | None, floor: float, memory: float = 4.5) -> Row:
    case = Case(1, 32, 10)
    return Row(variant, case, Speed(case, 0.5, 1.0, rate and 10 / rate, 1, int(memory * 2**30)), floor)


def test_cells_are_written_as_in_the_guide() -> None:
    found = row("unfused", 38.45372, 768)
    assert guide_cells(report(found), found) == (1, 32, 10, "64", "38.4537", "4.50 GB (5.68%)")
    noisy = row("unfused", None, 768)
    assert guide_cells(report(noisy), noisy)[4] == "-"
    failed = Row("unfused", Case(8, 32, 10), None, error="out of memory")
    assert guide_cells(report(failed), failed) == (8, 32, 10, "-", "-", "out of memory")


def test_the_printed_report_of_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "220")
    print_report(
        report(
            row("unfused", 40, 768), row("fused", 384, 768, 4.0), row("dense", 100, 211),
            made=(Made("fused", 3.0, 1.5, 2**32, "the fused model has no fast decode step: it is a toy"),),
            notes=("a note of the run",),
        )
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count(f"{GUIDE} (VRAM)") == 3
    beside = next(line for line in shown.splitlines() if "9.60x" in line)
    assert beside.split() == ["1", "32", "10", "100.0", "40.0", "384.0", "9.60x", "211.0", "768.0", "50%"]
    assert "floor: 3000 GB/s (copy 3000, read 2500" in shown
    assert "fused: 4.00 GB of weights" in shown
    assert "no fast decode step: it is a toy" in shown
    assert "a note of the run" in shown
    assert "(RAM)" not in shown
