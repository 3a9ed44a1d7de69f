"""One model, one case: prefill, the raw decode loop, ``generate()``, and the memory that they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .loops import Case, Runner, runner
from .machine import PeakMemory, seconds


@dataclass(frozen=True)
class Speed:
    """What was measured: seconds (medians of the repeats) and bytes.

    * ``prefill_seconds``: one forward over the prompts that makes a cache, logits of the last token only
    * ``loop_seconds``: ``decode`` forwards of one token each, greedy, after such a prefill; what feeds them is no more
      than an argmax
    * ``generate_seconds``: what ``model.generate()`` (greedy, no streamer) takes longer for ``decode`` + 1 new tokens
      than for one; None where the clock's noise is larger than that
    * ``forward_memory``, ``memory``: the peak of the prefill alone, and of everything
    """

    case: Case
    prefill_seconds: float
    loop_seconds: float
    generate_seconds: float | None
    forward_memory: int
    memory: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, of the whole batch."""
        return self.case.batch_size * self.case.prefill / self.prefill_seconds

    @property
    def loop_rate(self) -> float:
        """Tokens per second of the raw loop, of the whole batch."""
        return self.case.batch_size * self.case.decode / self.loop_seconds

    @property
    def generate_rate(self) -> float | None:
        """Tokens per second of ``generate()`` after the first one, of the whole batch."""
        seconds = self.generate_seconds
        return None if seconds is None else self.case.batch_size * self.case.decode / seconds


def prompts(model: Any, case: Case, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, prefill], the same for every model of one vocabulary."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (case.batch_size, case.prefill), generator=torch.Generator().manual_seed(seed))
    return ids.to(model.device)


@torch.no_grad()  # not inference mode: what a model keeps from here is used by generate() too, which has only this
def measure(model: Any, case: Case, repeats: int = 3) -> Speed:
    """Measure one case after a warm-up of every part.

    A fused model with a fast decode step is measured through it: prefill into its static memory, then its own steps.
    """
    device, ids = torch.device(model.device), prompts(model, case)
    memory = PeakMemory(device)

    def middle(call: Callable[[], object]) -> float:
        return statistics.median(seconds(call, device) for _ in range(repeats))

    with free_running(model):
        with runner(model, case) as run:
            run.prefill(ids)
            memory.start()
            prefill_seconds = middle(lambda: run.prefill(ids))
            forward_memory = memory.bytes()
            memory.start()
            run.decode(run.prefill(ids), 3)
            loop_seconds = statistics.median(_loop(run, ids, case.decode, device) for _ in range(repeats))
        generate(model, ids, 3)
        decoding = statistics.median(
            seconds(lambda: generate(model, ids, case.decode + 1), device)
            - seconds(lambda: generate(model, ids, 1), device)
            for _ in range(repeats)
        )
        peak = max(forward_memory, memory.bytes())
    return Speed(case, prefill_seconds, loop_seconds, decoding if decoding > 0 else None, forward_memory, peak)


def _loop(run: Runner, ids: torch.Tensor, tokens: int, device: torch.device) -> float:
    first = run.prefill(ids)
    return seconds(lambda: run.decode(first, tokens), device)


def generate(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Exactly ``new_tokens`` greedy tokens (inside ``free_running``, where no token ends a sequence)."""
    found: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return found


@contextmanager
def free_running(model: Any) -> Iterator[None]:
    """Take from the model's generation config what would end a sequence, sample, or change greedy decoding."""
    before = model.generation_config
    model.generation_config = type(before)(use_cache=True)
    try:
        yield
    finally:
        model.generation_config = before


@torch.no_grad()
def first_answer_seconds(model: Any, case: Case) -> float:
    """Seconds of the very first ``generate()`` of two tokens after loading: compilation, capture and warm-up."""
    ids = prompts(model, case)
    with free_running(model):
        return seconds(lambda: generate(model, ids, 2), torch.device(model.device))
