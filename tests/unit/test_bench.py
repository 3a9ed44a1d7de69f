from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from awq_core import ConfigError, LayoutError
from awq_core.bench import machine, plots, run, sources
from awq_core.bench.floor import cache_bytes, floor_from, weight_bytes
from awq_core.bench.loops import Case, runner
from awq_core.bench.measure import Speed, free_running, generate, measure, prompts
from awq_core.bench.models import CONFIGS, named_config, random_awq_model, random_dense_model
from awq_core.bench.run import Report, Row
from awq_core.experts import AwqExperts
from awq_core.hf.random_weights import count_parameters, make_config
from awq_core.linear import AwqLinear
from awq_core.packed import PackedModule

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def config(kind: str = "llama", **more: Any) -> Any:
    return make_config(kind, SIZES | more)


def awq_model(kind: str = "llama", **options: Any) -> Any:
    sizes = options.pop("sizes", {})
    return random_awq_model(config(kind, **sizes), **({"group_size": 32, "dtype": torch.float32} | options))


# Random models


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' own pages count them
        ("mistral-7b", 7_241_732_096),
        ("llama-3-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("yi-34b", 34_388_917_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("tinyllama", 1_100_048_384),
    ],
)
def test_named_configurations_have_the_sizes_of_the_real_models(name: str, parameters: int) -> None:
    assert count_parameters(named_config(name)) == parameters


def test_names_and_layers_that_are_not_there() -> None:
    assert set(CONFIGS) == {
        "mistral-7b", "llama-3-8b", "qwen2.5-7b", "yi-34b", "mixtral-8x7b", "tinyllama",
    }  # fmt: skip
    assert named_config("yi-34b", 3).num_hidden_layers == 3
    with pytest.raises(ConfigError, match="no configuration called 'gpt-5': choose mistral-7b"):
        named_config("gpt-5")
    with pytest.raises(ConfigError, match="layers is 0"):
        named_config("yi-34b", 0)


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm_awq", "marlin"])
def test_a_random_model_runs_in_every_layout(layout: str) -> None:
    model = awq_model("qwen2", layout=layout, group_size=64, sizes={"hidden_size": 128, "vocab_size": 128})
    logits = model(torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0.01 < float(logits.std()) < 100
    kinds = {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear | PackedModule)}
    assert kinds == {AwqLinear, torch.nn.Linear}  # the output embedding is left dense
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert all(m.plans for m in model.modules() if isinstance(m, PackedModule))


def test_a_random_model_is_what_from_pretrained_would_give(tmp_path: Path) -> None:
    from awq_core.hf.loading import load_model

    model = awq_model()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.float32, CPU)
    ids = torch.arange(16)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_random_models_are_repeatable_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = awq_model(), awq_model(), awq_model(seed=1)
    assert torch.equal(torch.rand(1), wanted)
    ids = torch.arange(9)[None]
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert not torch.equal(one(ids).logits, other(ids).logits)


def test_experts_and_tied_embeddings() -> None:
    model = awq_model("mixtral", sizes={"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True})
    assert sum(isinstance(m, AwqExperts) for m in model.modules()) == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(LayoutError, match="group_size 48 does not divide in_features 64"):
        awq_model(group_size=48)


# The floor


def test_bytes_that_a_step_reads() -> None:
    model = awq_model(sizes={"tie_word_embeddings": False}, dtype=torch.bfloat16)
    kn = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)  # q, k and v, o, mlp
    packed = kn // 2 + kn // 32 // 2 + kn // 32 * 2  # codes, zeros, scales
    dense = 2 * (96 * 64 + 5 * 64)  # output embedding and norms
    assert weight_bytes(model, 1) == weight_bytes(model, 8) == packed + dense
    tied = awq_model(sizes={"tie_word_embeddings": True}, dtype=torch.bfloat16)
    assert weight_bytes(tied, 1) == packed + dense
    plain = random_dense_model(config(tie_word_embeddings=False), dtype=torch.bfloat16)
    assert weight_bytes(plain, 1) == 2 * kn + dense


def test_a_fused_model_reads_the_same_bytes() -> None:
    one, other = awq_model(), awq_model(fuse_max_seq_len=64)
    assert sum(isinstance(m, AwqLinear) for m in other.modules()) < sum(isinstance(m, AwqLinear) for m in one.modules())
    assert weight_bytes(other, 1) == weight_bytes(one, 1)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_step_reads_the_experts_that_its_tokens_choose(quantized: bool) -> None:
    make = random_awq_model if quantized else random_dense_model
    options: dict[str, Any] = {"group_size": 32} if quantized else {}
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = make(config("mixtral", **sizes), dtype=torch.bfloat16, **options)
    every = make(config("mixtral", **sizes | {"num_experts_per_tok": 4}), dtype=torch.bfloat16, **options)
    block = 2 * 4 * 3 * 64 * 128  # layers, experts, gate, up and down
    whole = block / 2 + block / 32 / 2 + block / 32 * 2 if quantized else block * 2
    for batch in (1, 2, 100):
        left_out = whole * (1 / 2) ** batch
        assert weight_bytes(model, batch) == pytest.approx(weight_bytes(every, batch) - left_out)


def test_cache_and_floor() -> None:
    model = awq_model(dtype=torch.bfloat16)
    assert (
        cache_bytes(model.config, 3, 10, torch.bfloat16) == 2 * 3 * 2 * 2 * 16 * 10 * 2
    )  # k+v, B, layers, heads, D, T
    sliding = config("mistral", sliding_window=4)
    assert cache_bytes(sliding, 1, 10, torch.bfloat16) == 2 * 2 * 2 * 16 * 4 * 2
    read = 1000 + cache_bytes(model.config, 3, 10, torch.bfloat16)
    assert floor_from(1000, model, 3, 10, 1e6) == pytest.approx(3e6 / read)


# Measuring


@pytest.mark.parametrize("fused", [False, True])
def test_measured_loops_do_what_generate_does(fused: bool) -> None:
    """The last token of the raw loop is that of ``generate()``: nothing is skipped, nothing runs twice."""
    model = awq_model(fuse_max_seq_len=64 if fused else None)
    case = Case(2, 12, 7)
    ids = prompts(model, case)
    with torch.no_grad(), free_running(model):
        found = generate(model, ids, 8)
        with runner(model, case) as raw:
            assert type(raw).__name__ == ("StepRunner" if fused else "ForwardRunner")
            for _ in range(2):
                assert torch.equal(raw.decode(raw.prefill(ids), 7), found[:, -1:])
    assert found.shape == (2, 20)
    assert torch.equal(found[:, :12], ids)


def test_no_token_ends_what_is_measured() -> None:
    model = awq_model()
    model.generation_config.eos_token_id = list(range(96))
    before = model.generation_config
    with torch.no_grad(), free_running(model):
        assert generate(model, prompts(model, Case(1, 4, 9)), 9).shape == (1, 13)
    assert model.generation_config is before


def test_rates_are_those_of_the_whole_batch() -> None:
    speed = Speed(Case(4, 100, 50), 0.5, 2.0, 4.0, 1, 2)
    assert (speed.prefill_rate, speed.loop_rate, speed.generate_rate) == (800, 100, 50)
    assert replace(speed, generate_seconds=None).generate_rate is None


def test_measure_on_a_cpu() -> None:
    speed = measure(awq_model(), Case(1, 8, 4), repeats=1)
    assert min(speed.prefill_seconds, speed.loop_seconds) > 0
    assert speed.memory >= speed.forward_memory > 10_000_000


def test_devices() -> None:
    assert machine.pick_device("cpu") == CPU
    for text, words in (("toaster", "not understood"), ("meta", "cannot be measured"), ("cuda:99", "no such GPU")):
        with pytest.raises(ConfigError, match=words):
            machine.pick_device(text)
    assert "threads" in machine.describe(CPU)
    assert 0 < machine.free_memory(CPU) <= machine.total_memory(CPU)


def test_bandwidth_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(machine, "seconds", lambda call, device: (call(), 0.5)[1])
    assert machine.measure_bandwidth(CPU) == machine.Bandwidth(2 * 2**20, 4 * 2**20)
    assert machine.Bandwidth(1.0, 2.0).best == 2.0


# A whole run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> sources.Named:
    monkeypatch.setitem(CONFIGS, "small", ("llama", SIZES))
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**20)
    return sources.Named("small", group_size=32)


CASES = (Case(1, 8, 4), Case(2, 8, 4))


def measured(small: sources.Named, **options: Any) -> Report:
    given = {"variants": ("unfused", "fused", "dense"), "cases": CASES, "device": CPU, "dtype": torch.float32}
    return run.run(small, **(given | {"repeats": 1} | options))


def test_run_measures_every_variant_on_every_case(small: sources.Named) -> None:
    steps: list[tuple[int, int, str]] = []
    report = measured(small, progress=lambda *step: steps.append(step))
    assert [(row.variant, row.case) for row in report.rows] == [
        (variant, case) for variant in ("unfused", "fused", "dense") for case in CASES
    ]
    assert all(row.speed is not None and row.floor is not None and row.error is None for row in report.rows)
    unfused, fused, dense = (report.at(name, CASES[0]) for name in ("unfused", "fused", "dense"))
    assert unfused is not None
    assert fused is not None
    assert dense is not None
    assert unfused.floor == fused.floor
    assert unfused.floor > 1.5 * dense.floor
    assert [made.variant for made in report.made] == ["unfused", "fused", "dense"]
    assert report.made[1].note is None  # a Llama has a fast decode step
    assert [done for done, *_ in steps] == list(range(9))
    assert {total for _, total, _ in steps} == {9}
    assert report.versions["torch"] == torch.__version__


def test_what_there_is_no_memory_or_fuser_for_is_left_out(
    small: sources.Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    report = measured(small, cases=CASES[:1])
    assert [row.variant for row in report.rows] == ["unfused"]
    assert [note.split(":")[0] for note in report.notes] == [
        "no fuser is installed",
        "the dense model is left out",
    ]


def test_a_case_without_memory_is_a_row_with_an_error(small: sources.Named, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_small(model: Any, case: Case, repeats: int) -> Speed:
        if case.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Speed(case, 1.0, 1.0, 1.0, 1, 1)

    monkeypatch.setattr(run, "measure", measure_small)
    first, second = measured(small, variants=("unfused",)).rows
    assert first.speed is not None
    assert (second.speed, second.error) == (None, "out of memory")


def test_a_case_beyond_the_positions_is_refused(small: sources.Named) -> None:
    with pytest.raises(ConfigError, match="makes 65 tokens, and the model has 64 positions"):
        measured(small, cases=[Case(1, 60, 4)])


# Charts


def report_of(*rows: Row) -> Report:
    return Report("small", "a GPU", "float16", 100 * 2**30, machine.Bandwidth(1e12, 1e12), rows, on_gpu=True)


def row(variant: Any, batch: int, gigabytes: float, rate: float, prefill: int = 8) -> Row:
    case = Case(batch, prefill, 10)
    return Row(variant, case, Speed(case, 1.0, 1.0, batch * 10 / rate, int(gigabytes * 2**30), int(gigabytes * 2**30)))


def test_charts_show_each_variant_by_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = plots.pyplot()
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    failed = Row("fused", Case(4, 8, 10), None, error="out of memory")
    report = report_of(
        row("unfused", 1, 4.5, 38), row("unfused", 1, 9, 99, prefill=16), row("unfused", 4, 5, 120),
        row("fused", 1, 4, 106), failed,
    )  # fmt: skip
    files = plots.write_plots(report, tmp_path / "new")
    assert [file.name for file in files] == ["forward_memory.png", "generate_throughput.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(file.name for file in files)
    memory, throughput = (figure.axes[0] for figure in drawn)
    heights = [[round(bar.get_height(), 3) for bar in bars] for bars in memory.containers]
    assert heights == [[4.5, 5.0], [4.0, 0.0]]
    assert [[round(bar.get_height(), 3) for bar in bars] for bars in throughput.containers] == [[38, 120], [106, 0]]
    assert [text.get_text() for text in memory.get_legend().get_texts()] == ["unfused", "fused"]
    assert "forward peak memory" in memory.get_ylabel()


def test_an_interrupted_chart_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def broken(self: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="no space left"):
        plots.write_plots(report_of(row("unfused", 1, 4.5, 38)), tmp_path)
    assert list(tmp_path.iterdir()) == []
