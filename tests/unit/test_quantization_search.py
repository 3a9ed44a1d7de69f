"""The parts of the AWQ search against plain formulas, and the calibration text."""

from __future__ import annotations

import json

import pytest
import torch

from awq_core import CheckpointError, ConfigError
from awq_core.hf.search import exact_matmuls
from awq_core.layouts import dequantize
from awq_core.quantization import scales as scales_module
from awq_core.quantization.block import Hidden
from awq_core.quantization.clip import search_ranges
from awq_core.quantization.correct import corrected
from awq_core.quantization.feedback import round_with_feedback
from awq_core.quantization.fold import Group, Rows
from awq_core.quantization.grid import fit, nearest, ranges
from awq_core.quantization.moments import Moments
from awq_core.quantization.rtn import quantize_weight
from awq_core.quantization.scales import Target, quadratic, search_scales
from awq_core.quantization.settings import PAPER, Settings
from awq_core.quantization.state import State
from awq_core.quantization.text import Text, default_text, read_text, windows

N, K, G = 24, 128, 32


@pytest.fixture
def problem():
    """A weight [N, K] and the second moments of inputs that are correlated and have strong channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    x = torch.randn(512, K, generator=generator) @ (
        torch.eye(K) + 0.3 * torch.randn(K, K, generator=generator) / K**0.5 * 4
    )
    x[:, ::17] *= 12
    return weight, x


@pytest.mark.parametrize("zero_point", [True, False])
def test_the_grid_is_that_of_rounding_to_nearest(zero_point, problem):
    weight, _ = problem
    grid = fit(*ranges(weight, G), zero_point)
    codes = grid.codes(grid.round(weight), torch.float16)
    wanted = quantize_weight(weight, G, zero_point)
    for name in ("codes", "zeros", "scales"):
        assert torch.equal(getattr(codes, name), getattr(wanted, name))
    assert torch.allclose(dequantize(codes, torch.float32).T, grid.round(weight), atol=1e-6)


def test_a_weight_that_has_no_code():
    with pytest.raises(CheckpointError, match="NaN or inf, or its scales do not fit"):
        nearest(torch.full((1, G), 1e9), G, True)


def test_the_loss_is_the_error_of_the_output(problem):
    weight, x = problem
    error = nearest(weight, G, True) - weight
    moments = x.T @ x / len(x)
    assert quadratic(error, moments) == pytest.approx(float((x @ error.T).pow(2).sum() / len(x)), rel=1e-4)


@pytest.mark.parametrize("duo", [True, False])
def test_scales_protect_strong_channels(problem, duo):
    weight, x = problem
    moments = x.T @ x / len(x)
    found = search_scales([Target(weight, moments)], x.abs().mean(0), G, True, duo=duo)
    assert found.loss < 0.7 * found.plain
    strong, weak = found.scales[::17].mean(), found.scales[1::17].mean()
    assert strong > 1.5 * weak
    scaled = nearest(weight * found.scales, G, True) / found.scales
    assert quadratic(scaled - weight, moments) == pytest.approx(found.loss, rel=1e-3)


def test_the_coarse_search_loses_little_for_half_the_work(problem, monkeypatch):
    weight, x = problem
    count = []
    real = scales_module.output_error
    monkeypatch.setattr(scales_module, "output_error", lambda *a: count.append(a) or real(*a))

    def found(coarse):
        count.clear()
        target = Target(weight, x.T @ x / len(x))
        return search_scales([target], x.abs().mean(0), G, True, coarse=coarse), len(count)

    (full, many), (coarse, few) = found(False), found(True)
    assert (many, few) == (21, 10)  # one without scales
    assert full.loss <= coarse.loss
    assert coarse.plain - coarse.loss > 0.95 * (full.plain - full.loss)


def test_no_scales_where_none_help():
    weight = torch.zeros(8, G)
    found = search_scales([Target(weight, torch.eye(G))], torch.ones(G), G, True)
    assert found.ratio is None
    assert bool((found.scales == 1).all())


def test_tied_scales_are_equal_where_the_source_is():
    group = Group(("o",), ("o.weight",), (("o",),), Rows("v", torch.tensor([2, 0, 2, 0])))
    assert group.tied
    tied = group.tie(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert torch.allclose(tied, torch.tensor([2.0, 4.0, 2.0, 4.0]))


@pytest.mark.parametrize("zero_point", [True, False])
def test_ranges_are_the_best_of_those_tried(problem, zero_point):
    weight, x = problem
    weight[0, 3] = 9  # an outlier that a shorter range gives up
    moments = x.T @ x / len(x)
    grid = search_ranges(weight, moments, G, zero_point)
    low, high = ranges(weight, G)
    block = moments[:G, :G]
    losses = []
    for step in range(10):
        error = fit(low * (1 - step / 20), high * (1 - step / 20), zero_point).round(weight)[:, :G] - weight[:, :G]
        losses.append(((error @ block) * error).sum(1))
    error = grid.round(weight)[:, :G] - weight[:, :G]
    assert torch.allclose(((error @ block) * error).sum(1), torch.stack(losses).amin(0), rtol=1e-4)


def test_feedback_stays_on_the_grid_and_beats_nearest(problem):
    weight, x = problem
    moments = x.T @ x / len(x)
    grid = search_ranges(weight, moments, G, True)
    rounded = round_with_feedback(weight, moments, grid, G)
    assert torch.allclose(grid.round(rounded), rounded, atol=1e-6)
    assert quadratic(rounded - weight, moments) < 0.7 * quadratic(grid.round(weight) - weight, moments)


def test_feedback_is_that_of_plain_loops(problem):
    """Column by column: round, divide the error by the factor's diagonal, take it back from the columns to come."""
    weight, x = problem
    moments = x.T @ x / len(x)
    grid = fit(*ranges(weight, G), True)
    order = torch.argsort(moments.diagonal(), descending=True)
    damped = moments[order][:, order] + 0.05 * moments.diagonal().mean() * torch.eye(K)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double())).T.contiguous()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    scales, zeros = (t[:, order].double() for t in grid.columns(G))
    left, wanted = weight[:, order].double(), torch.zeros(N, K, dtype=torch.float64)
    for i in range(K):
        code = (left[:, i] / scales[:, i]).round().clamp(-zeros[:, i], 15 - zeros[:, i])
        wanted[:, i] = code * scales[:, i]
        left[:, i + 1 :] -= ((left[:, i] - wanted[:, i]) / upper[i, i])[:, None] * upper[i, i + 1 :]
    found = round_with_feedback(weight, moments, grid, G, damping=0.05)[:, order]
    assert ((found - wanted.float()).abs() > 1e-4).float().mean() < 0.01  # ties may fall either way


def test_feedback_where_channels_are_dead(problem):
    weight, x = problem
    x[:, 5] = 0
    grid = fit(*ranges(weight, G), True)
    assert bool(round_with_feedback(weight, x.T @ x / len(x), grid, G).isfinite().all())
    assert bool(round_with_feedback(weight, torch.zeros(K, K), grid, G).isfinite().all())


def test_the_corrected_weight_is_the_least_squares_one(problem):
    weight, x = problem
    seen = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    moments = Moments(K, torch.device("cpu"))
    moments.add(seen[:100], x[:100])
    moments.add(seen[100:], x[100:])
    assert moments.drift is not None
    wanted = torch.linalg.lstsq(seen.double(), x.double() @ weight.double().T).solution.T
    found = corrected(weight, moments.square, moments.drift, share=1.0, damping=1e-7)
    assert torch.allclose(found, wanted.float(), atol=1e-2)
    assert torch.allclose(corrected(weight, moments.square, moments.drift, 0.0, 0.1), weight)


def test_settings():
    assert Settings.of({"seed": 1, **PAPER}).feedback is False
    with pytest.raises(ConfigError, match="no option 'grou_size'; those of the search: clip, "):
        Settings.of({"grou_size": 64})


def test_state_continues_only_after_a_whole_block(tmp_path):
    state = State.beside(tmp_path / "out", {"options": {"a": 1}})
    assert state.begin(resume=True) == 0
    hidden = Hidden([torch.ones(1, 2, 3)], [torch.zeros(1, 2, 3)])
    for number in range(3):
        state.save(number, {f"{number}.w": torch.full((2,), number)}, {"block": number}, hidden)
    assert state.begin(resume=True) == 3
    found = state.hidden(2)
    assert found.dense is not None
    assert torch.equal(found.seen[0], hidden.seen[0])
    assert torch.equal(state.tensors(3).get("1.w"), torch.full((2,), 1))
    assert [record["block"] for record in state.records(3)] == [0, 1, 2]
    (state.folder / "block-00001.safetensors").unlink()
    assert state.begin(resume=True) == 0
    state.remove()
    assert not list(tmp_path.iterdir())


def encode(text):
    return [ord(letter) for letter in text]


def test_windows_are_drawn_equally_and_without_overlap():
    text = Text("t", (("a", "a" * 1000), ("b", "".join(chr(1000 + i) for i in range(300)))))
    ids = windows(text, encode, 8, 50, seed=0)
    assert ids.shape == (8, 50)
    from_b = ids[ids[:, 0] >= 1000]
    assert len(from_b) == 4
    assert len(from_b.unique()) == 200
    assert torch.equal(ids, windows(text, encode, 8, 50, seed=0))
    assert not torch.equal(ids, windows(text, encode, 8, 50, seed=1))
    prefixed = windows(text, encode, 8, 50, seed=0, prefix=[7])
    assert bool((prefixed[:, 0] == 7).all())
    assert prefixed.shape == (8, 50)


@pytest.mark.parametrize(("samples", "length"), [(27, 50), (1, 2000)])
def test_too_little_text(samples, length):
    with pytest.raises(ConfigError, match=r"1300 tokens of calibration text make \d+ windows of \d+, wanted \d+: give"):
        windows(Text("t", (("a", "a" * 1300),)), encode, samples, length, seed=0)


def test_no_text_at_all():
    with pytest.raises(ConfigError, match=r"a\.txt holds no text to calibrate on"):
        windows(Text("a.txt", (("a.txt", ""),)), encode, 1, 50, seed=0)


def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\r\n"three"\n', encoding="utf-8")
    assert read_text(tmp_path / "a.jsonl").documents == (("a.jsonl", "one\u2028two\n\nthree"),)


def test_files_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one"}\n\n{"messages": [{"role": "user", "content": "two"}]}\n"three"\n'
    )
    (tmp_path / "c.json").write_text(json.dumps([{"content": "four"}]))
    (tmp_path / "d.bin").write_bytes(b"\0")
    found = read_text(tmp_path)
    assert found.documents == (("a.txt", "plain"), ("b.jsonl", "one\n\ntwo\n\nthree"), ("c.json", "four"))
    assert read_text(tmp_path / "a.txt").documents == (("a.txt", "plain"),)
    assert found.sha256 != read_text(tmp_path / "a.txt").sha256


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"label": 1}', r"a\.jsonl cannot be read as calibration text: line 1: an entry has no text"),
        ("a.jsonl", b'"a"\n{', r"a\.jsonl cannot be read as calibration text: line 2 is no JSON \(Expecting"),
        ("a.txt", b"\xff\xfe\xfa", r"a\.txt cannot be read as calibration text: byte 0 is no UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read_text(tmp_path / name)


def test_an_empty_folder_of_text(tmp_path):
    with pytest.raises(ConfigError, match="holds no calibration text"):
        read_text(tmp_path)


def test_the_default_text_is_enough_for_the_default_windows():
    text = default_text()
    assert [name for name, _ in text.documents] == ["emma.txt", "jargon.txt"]
    assert all(len(document) > 100_000 for _, document in text.documents)


@pytest.mark.parametrize("device", ["cuda", "mkldnn"])
def test_the_search_multiplies_in_float32_and_leaves_the_callers_precision(device):
    switch = getattr(torch.backends, device).matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        with exact_matmuls():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before
