"""The raw loops: prefill and decode without ``generate()``, through a fused model's fast step where it has one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..hf.decode import ENGINE, StaticMemory, why_not


@dataclass(frozen=True)
class Case:
    """A batch of prompts of ``prefill`` tokens, continued by ``decode`` tokens."""

    batch_size: int
    prefill: int
    decode: int

    @property
    def length(self) -> int:
        """The longest sequence: prompt and answer."""
        return self.prefill + self.decode + 1

    def __str__(self) -> str:
        return f"batch {self.batch_size}, prefill {self.prefill}, decode {self.decode}"


class Runner(Protocol):
    """How a model is run over one case."""

    def prefill(self, ids: torch.Tensor) -> Any:
        """Prompts [B, P] to the model's output for the last token, with a cache that ``decode`` goes on with."""
        ...

    def decode(self, out: Any, tokens: int) -> torch.Tensor:
        """``tokens`` greedy steps after ``out``, fed by an argmax and no more; the last tokens [B, 1]."""
        ...


class ForwardRunner:
    """Plain forwards of the model, with the cache that it makes itself."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, ids: torch.Tensor) -> Any:
        """One forward, logits of the last token."""
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(self, out: Any, tokens: int) -> torch.Tensor:
        """One forward a token."""
        cache = out.past_key_values
        token: torch.Tensor = out.logits[:, -1:].argmax(-1)
        for _ in range(tokens):
            logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
        return token


class StepRunner:
    """The fast decode step of a fused model over its static memory."""

    def __init__(self, model: Any, session: Any) -> None:
        self.model, self.session = model, session

    def prefill(self, ids: torch.Tensor) -> Any:
        """One forward that writes the static memory from its beginning."""
        self.session.start(0, None)
        return self.model(input_ids=ids, past_key_values=StaticMemory(self.session), use_cache=True, logits_to_keep=1)

    def decode(self, out: Any, tokens: int) -> torch.Tensor:
        """One step a token."""
        token: torch.Tensor = out.logits[:, -1].max(-1).indices
        for _ in range(tokens):
            token = self.session.logits(token).max(-1).indices
        return token[:, None]


@contextmanager
def runner(model: Any, case: Case) -> Iterator[Runner]:
    """The fastest loop that ``model`` has for ``case``."""
    if why_not(model) is not None:
        yield ForwardRunner(model)
        return
    with model.__dict__[ENGINE].session(case.batch_size, case.length) as session:
        yield StepRunner(model, session)
