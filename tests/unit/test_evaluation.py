from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from awq_core import AwqError, ConfigError
from awq_core.evaluation import scores
from awq_core.evaluation.scores import score
from awq_core.evaluation.text import cut_windows, read_text
from awq_core.testing.tiny import ARCHITECTURES


def model(seed: int, vocab_size: int = 128, positions: int = 64) -> Any:
    import transformers

    name, sizes = ARCHITECTURES["llama"]
    config = getattr(transformers, name)(
        **(sizes | {"vocab_size": vocab_size, "max_position_embeddings": positions, "initializer_range": 0.2})
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return {"a": model(0), "b": model(1)}


TOKENS = torch.randint(0, 128, (300,), generator=torch.Generator().manual_seed(0))


# Windows


def test_independent_windows_count_every_token_but_their_first() -> None:
    windows = cut_windows(torch.arange(105_340), 1024)
    assert (len(windows.first), windows.predictions, windows.stride) == (102, 104_346, 1024)
    assert set(windows.first) == {1}
    assert torch.equal(windows.ids.flatten(), torch.arange(102 * 1024))


@pytest.mark.parametrize(("context", "stride"), [(16, 5), (16, 15), (16, 1), (7, 7)])
def test_windows_that_overlap_count_each_token_once(context: int, stride: int) -> None:
    windows = cut_windows(torch.arange(100), context, stride)
    counted = [int(i) for row, first in zip(windows.ids, windows.first, strict=True) for i in row[first:]]
    assert len(counted) == len(set(counted)) == windows.predictions
    if stride < context:
        assert counted == list(range(1, counted[-1] + 1))
        assert all(int(row[0]) == n * stride for n, row in enumerate(windows.ids))


def test_fewer_windows_are_spread_over_the_text() -> None:
    windows = cut_windows(torch.arange(100), 10, count=4)
    assert windows.ids[:, 0].tolist() == [0, 30, 60, 90]
    assert cut_windows(torch.arange(100), 10, count=1).ids[:, 0].tolist() == [0]
    assert len(cut_windows(torch.arange(100), 10, count=50).first) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 1}, "2 tokens at least"),
        ({"context": 8, "stride": 9}, "between 1 and the context"),
        ({"context": 8, "stride": 0}, "between 1 and the context"),
        ({"context": 8, "count": 0}, "one at least"),
        ({"context": 101}, "has 100 tokens and one window needs 101"),
    ],
)
def test_windows_that_cannot_be(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cut_windows(torch.arange(100), **options)


# Text


def test_the_default_text_is_small_and_there() -> None:
    text = read_text(None)
    assert text.startswith("Persuasion\n\nby\n\nJane Austen")
    assert 100_000 < len(text.encode()) <= 120_000


def test_what_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    for content, words in ((b"\xff\xfe\x00", "not UTF-8"), (b" \n", "is empty")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=words) as caught:
            read_text(file)
        assert str(file) in str(caught.value)


# Scores


def by_hand(models: dict[str, Any], context: int, stride: int) -> tuple[float, float, float]:
    """Mean nll of b, KL(a||b) and agreement, in float64, one window and one position at a time."""
    nll, kl, same, count = 0.0, 0.0, 0, 0
    last = 0  # the last token that was counted
    with torch.no_grad():
        for begin in range(0, len(TOKENS) - context + 1, stride):
            ids = TOKENS[begin : begin + context]
            p, q = (models[name](ids[None]).logits[0].double().log_softmax(-1) for name in ("a", "b"))
            for at in range(1, context):
                if begin + at > last or stride == context:
                    nll -= float(q[at - 1, ids[at]])
                    kl += float(functional.kl_div(q[at - 1], p[at - 1], reduction="sum", log_target=True))
                    same += int(p[at - 1].argmax() == q[at - 1].argmax())
                    count += 1
            last = begin + context - 1
    return nll / count, kl / count, same / count


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (32, 12)])
@pytest.mark.parametrize(("batch", "chunk"), [(1, 1), (3, 10 * 128 * 4), (None, 10**9)])
def test_scores_are_those_computed_by_hand(
    two: dict[str, Any], monkeypatch: pytest.MonkeyPatch, context: int, stride: int, batch: int | None, chunk: int
) -> None:
    monkeypatch.setattr(scores, "CHUNK_BYTES", chunk)
    found = score(two, cut_windows(TOKENS, context, stride), reference="a", batch_size=batch)
    nll, kl, same = by_hand(two, context, stride)
    assert list(found) == ["a", "b"]
    assert found["b"].nll == pytest.approx(nll, rel=1e-5)
    assert found["b"].perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["b"].kl == pytest.approx(kl, rel=1e-4)
    assert found["b"].top1 == pytest.approx(same)
    assert (found["a"].kl, found["a"].top1) == (0.0, 1.0)
    assert found["b"].tokens_per_second > 0


def test_the_reference_may_come_last(two: dict[str, Any]) -> None:
    windows = cut_windows(TOKENS, 32)
    assert score(two, windows, reference="b")["a"].kl != score(two, windows, reference="a")["b"].kl


def test_without_a_reference_nothing_is_compared(two: dict[str, Any]) -> None:
    steps: list[tuple[int, int, str]] = []
    found = score(two, cut_windows(TOKENS, 32), batch_size=4, progress=lambda *step: steps.append(step))
    assert {(s.kl, s.top1) for s in found.values()} == {(None, None)}
    assert found["a"].nll != found["b"].nll
    assert steps == [(n + 1, 6, "ab"[n % 2]) for n in range(6)]


def test_a_broken_model_is_named(two: dict[str, Any]) -> None:
    class Broken:
        config, device, dtype = two["a"].config, torch.device("cpu"), torch.float32

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 128), float("nan")))

    with pytest.raises(AwqError, match="broken one gives logits that are NaN"):
        score({"a": two["a"], "broken one": Broken()}, cut_windows(TOKENS, 32), reference="a")


def test_models_that_cannot_be_compared(two: dict[str, Any]) -> None:
    other = {"a": two["a"], "c": model(0, vocab_size=130)}
    with pytest.raises(ConfigError, match="a has 128, c has 130"):
        score(other, cut_windows(TOKENS, 32), reference="a")
    assert set(score(other, cut_windows(TOKENS, 32))) == {"a", "c"}
    with pytest.raises(ConfigError, match="context is 65 tokens and a has 64 positions"):
        score(two, cut_windows(TOKENS, 65))
