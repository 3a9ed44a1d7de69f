"""From the prompt's logits to the finished sequences: greedy decoding and sampling without transformers' overhead.

It does what ``GenerationMixin._sample`` does in the same order, so that tokens, padding and the state of the random
generator come out the same. On a GPU the host never waits for the step that it has just started: whether all sequences
are finished is read while the next step runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .session import GreedyStep, Session

Tensor = torch.Tensor

LOOK_EVERY = 16  # steps between two looks at whether all sequences are finished: at most twice as many run for nothing
MOST_ENDS = 8  # ids that end a sequence which a greedy step knows (launch.ENDS)


@dataclass(frozen=True)
class Choice:
    """How the next token comes from logits: ``processors(ids [B, T], scores [B, V])`` first (None: none)."""

    processors: Callable[[Tensor, Tensor], Tensor] | None = None
    sample: bool = False

    @property
    def greedy(self) -> bool:
        """Whether it is the largest logit and nothing else."""
        return self.processors is None and not self.sample

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """ids [B, T] so far and logits [B, V] to tokens [B]."""
        if self.greedy:
            return logits.max(-1).indices  # the first one where several are largest, as argmax, which is slower
        scores = logits.to(torch.float32, copy=True)
        if self.processors is not None:
            scores = self.processors(ids.contiguous(), scores)
        if self.sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        return scores.argmax(-1)


@dataclass(frozen=True)
class Stop:
    """When a sequence ends: at ``max_length`` tokens, after one of ``eos`` [E] (the rest is ``pad``), or by ``others``.

    ``others(ids [B, T])`` gives a bool [B].
    """

    max_length: int
    eos: Tensor | None = None
    pad: int = 0
    others: Callable[[Tensor], Tensor] | None = None


def decode(
    session: Session,
    ids: Tensor,
    logits: Tensor,
    choice: Choice,
    stop: Stop,
    put: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The sequences [B, T'], T' <= max_length, that continue the prompt ``ids`` [B, T], whose last logits are given.

    The prompt is cached in ``session``. ``put`` gets each step's tokens [B] on the CPU, in order.
    """
    step = session.step
    fits = stop.others is None and (stop.eos is None or stop.eos.numel() <= MOST_ENDS)
    if choice.greedy and fits and isinstance(step, GreedyStep):
        return _on_device(session, step, ids, logits, choice, stop, put)
    return _step_by_step(session, ids, logits, choice, stop, put)


def _step_by_step(
    session: Session,
    ids: Tensor,
    logits: Tensor,
    choice: Choice,
    stop: Stop,
    put: Callable[[Tensor], None] | None,
) -> Tensor:
    batch, length = ids.shape
    kept = ids.new_empty(batch, stop.max_length)
    kept[:, :length] = ids
    unfinished = ids.new_ones(batch)
    asks = stop.eos is not None or stop.others is not None
    while True:
        tokens = choice(kept[:, :length], logits)
        if stop.eos is not None:
            tokens = tokens * unfinished + stop.pad * (1 - unfinished)
        kept[:, length] = tokens
        length += 1
        if stop.eos is not None:
            unfinished = unfinished & ~_among(tokens, stop.eos)
        if stop.others is not None:
            unfinished = unfinished & ~stop.others(kept[:, :length])
        last = length >= stop.max_length
        answer = Answer(tokens if put else None, unfinished if asks and not last else None)
        ahead = answer.waits and session.room > 0 and not last
        if ahead:
            logits = session.logits(tokens)  # before asking: the GPU has work while the host waits for the answer
        told, still_open = answer.read()
        if put is not None and told is not None:
            put(told)
        if last:
            return kept
        if still_open is not None and not bool(still_open.any()):
            return kept[:, :length].clone()
        if not ahead:
            logits = session.logits(tokens)


def _on_device(
    session: Session,
    step: GreedyStep,
    ids: Tensor,
    logits: Tensor,
    choice: Choice,
    stop: Stop,
    put: Callable[[Tensor], None] | None,
) -> Tensor:
    """Choice and end are part of the step: the host only starts steps, and looks now and then whether all is finished.

    Steps that ran after the end are cut off.
    """
    batch, prompt = ids.shape
    tokens = choice(ids, logits)
    unfinished = ids.new_ones(batch) if stop.eos is None else 1 - _among(tokens, stop.eos).long()
    state = step.start_greedy(tokens, unfinished, stop.eos, stop.pad, session.length, session.pads)
    if put is not None:
        put(tokens.cpu())
    every = 1 if put is not None else LOOK_EVERY
    wanted, done = stop.max_length - prompt - 1, 0
    looks = stop.eos is not None
    pending = Answer(None, state.left if looks else None)
    while done < wanted:
        run = min(every, wanted - done)
        for _ in range(run):
            state.run()
        done += run
        answer = Answer(state.tokens if put is not None else None, state.left if looks else None)
        told, left = pending.read()  # of the steps before: those just started keep the GPU busy meanwhile
        if put is not None and told is not None:
            put(told)
        if left is not None and not bool(left.any()):
            break
        pending = answer
    else:
        told, _ = pending.read()
        if put is not None and told is not None:
            put(told)
    session.length += done
    found = torch.cat([ids, tokens[:, None], state.ids[:, prompt + 1 : prompt + 1 + done]], dim=1)
    return found if stop.eos is None else found[:, : prompt + _longest(found[:, prompt:], stop.eos)].clone()


def _longest(new: Tensor, eos: Tensor) -> int:
    """How many tokens of new [B, N] the longest sequence has, its end included."""
    ends = (new[:, :, None] == eos).any(-1)
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, new.shape[1])
    return int(first.max())


def _among(tokens: Tensor, eos: Tensor) -> Tensor:
    return tokens == eos if eos.numel() == 1 else (tokens[:, None] == eos).any(-1)


class Answer:
    """Values on their way to the host: from a GPU through pinned memory, to be read when they are wanted."""

    def __init__(self, *values: Tensor | None) -> None:
        devices = {value.device for value in values if value is not None}
        self.waits = any(device.type == "cuda" for device in devices)
        self.values = list(values)
        if self.waits:
            for i, value in enumerate(values):
                if value is not None:
                    self.values[i] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                    self.values[i].copy_(value, non_blocking=True)  # type: ignore[union-attr]
            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.event.record(torch.cuda.current_stream(next(iter(devices))))
        else:
            self.values = [None if value is None else value.clone() for value in values]

    def read(self) -> list[Tensor | None]:
        """The values, on the host."""
        if self.waits:
            self.event.synchronize()
        return self.values
