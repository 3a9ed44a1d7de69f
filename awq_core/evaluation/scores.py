"""Perplexity, KL divergence and top-1 agreement of causal language models on the same windows of a text.

All sums run over the counted predictions of the windows. With p the reference's distribution of the next token and q
the model's, KL is the mean of sum p (log p - log q), in nats; top-1 agreement is the share of predictions at which both
find the same token most likely. Log-softmax is taken in float32, a few rows of logits at a time; sums are float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AwqError, ConfigError
from .text import Windows

LOGITS_BYTES = 256_000_000  # of one model's logits of one batch, unless a single window takes more
CHUNK_BYTES = 64_000_000  # of the float32 rows that are compared at once

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Score:
    """What one model scored. ``kl`` (nats) and ``top1`` are None where there is no reference to compare with."""

    nll: float
    predictions: int
    kl: float | None
    top1: float | None
    seconds: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood (inf where it is beyond a float)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def tokens_per_second(self) -> float:
        """Of the forwards alone, batches of whole windows."""
        return self.tokens / self.seconds


class _Sums:
    def __init__(self) -> None:
        self.nll = self.kl = self.seconds = 0.0
        self.same = 0


@torch.inference_mode()
def score(
    models: Mapping[str, Any],
    windows: Windows,
    reference: str | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """Score each of ``models`` (name -> causal language model of transformers) on the same windows, in one pass.

    ``reference`` names the model that the others are compared with. All models stay in memory, and of the logits
    [batch, context, vocab] those of one batch: ``batch_size`` windows, by default as many as make 256 MB a model.
    ``progress(done, total, name)`` is called after each model's batch.

    Raises:
        ConfigError: the models differ in vocabulary, or the windows are longer than a model's positions.
        AwqError: a model gives NaN or inf, by name.
    """
    _check(models, windows, reference)
    order = sorted(models, key=lambda name: name != reference)  # the reference first
    sums = {name: _Sums() for name in order}
    size = batch_size or _batch_size(models.values(), windows.context)
    batches = range(0, len(windows.first), size)
    for number, begin in enumerate(batches):
        ids = windows.ids[begin : begin + size]
        counted = _counted(windows.first[begin : begin + size], windows.context)
        base: torch.Tensor | None = None
        for place, name in enumerate(order):
            logits = _logits(models[name], ids, counted, sums[name])
            if name == reference:
                base = logits
            _add(sums[name], name, logits, ids[:, 1:][counted], base if reference is not None else None)
            if progress is not None:
                progress(number * len(order) + place + 1, len(batches) * len(order), name)
    total, tokens = windows.predictions, windows.ids.numel()
    compared = reference is not None
    return {
        name: Score(
            s.nll / total,
            total,
            s.kl / total if compared else None,
            s.same / total if compared else None,
            s.seconds,
            tokens,
        )
        for name in models
        for s in [sums[name]]
    }


def _counted(first: Sequence[int], context: int) -> torch.Tensor:
    """Bool [W, context - 1]: whether the logits at a position predict a counted token, which is the next one."""
    return torch.arange(1, context) >= torch.tensor(first)[:, None]


def _logits(model: Any, ids: torch.Tensor, counted: torch.Tensor, sums: _Sums) -> torch.Tensor:
    """Logits [predictions, vocab] of the counted positions, in the model's dtype."""
    given = ids.to(model.device)
    _wait(given.device)
    began = time.perf_counter()
    out = model(input_ids=given, use_cache=False).logits
    _wait(given.device)
    sums.seconds += time.perf_counter() - began
    found: torch.Tensor = out[:, :-1][counted.to(out.device)]
    return found


def _add(sums: _Sums, name: str, logits: torch.Tensor, targets: torch.Tensor, base: torch.Tensor | None) -> None:
    rows = max(1, CHUNK_BYTES // (logits.shape[-1] * 4))
    for at in range(0, len(logits), rows):
        log_q = torch.log_softmax(logits[at : at + rows].float(), -1)
        nll = -log_q.gather(-1, targets[at : at + rows, None].to(log_q.device)).sum(dtype=torch.float64).item()
        if not math.isfinite(nll):
            raise AwqError(f"{name} gives logits that are NaN or inf: the checkpoint or the kernel is broken")
        sums.nll += nll
        if base is None:
            continue
        if base is logits:
            sums.same += len(log_q)
            continue
        log_p = torch.log_softmax(base[at : at + rows].to(log_q.device).float(), -1)
        sums.kl += (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).sum().item()
        sums.same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def _check(models: Mapping[str, Any], windows: Windows, reference: str | None) -> None:
    vocab = {name: text_config(model).vocab_size for name, model in models.items()}
    if reference is not None and len(set(vocab.values())) > 1:
        sizes = ", ".join(f"{name} has {size}" for name, size in vocab.items())
        raise ConfigError(f"the models differ in vocabulary ({sizes} tokens), so there is no KL divergence of them")
    for name, model in models.items():
        longest = getattr(text_config(model), "max_position_embeddings", None)
        if longest is not None and windows.context > longest:
            raise ConfigError(
                f"the context is {windows.context} tokens and {name} has {longest} positions: take a smaller context"
            )


def text_config(model: Any) -> Any:
    """The config of the language model, also where it is a part of another one."""
    return model.config.get_text_config()


def _batch_size(models: Any, context: int) -> int:
    most = max(text_config(model).vocab_size * torch.empty(0, dtype=model.dtype).element_size() for model in models)
    return int(max(1, LOGITS_BYTES // (most * context)))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
