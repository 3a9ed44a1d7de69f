"""The decode step, and prefills of short prompts, as CUDA graphs: a replay costs the host a few microseconds.

Without them a short prompt takes the time that the host needs for some ten launches a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from awq_core.fragments.launch import own_counters

from .gpu_step import GpuStep
from .model import Decoder
from .prefill import Prefill
from .storage import SPARE, Storage

LENGTHS = (16, 32, 64, 128, 256, 512)  # that prompts are filled up to, for a graph each
MOST_PROMPT_ROWS = 512  # of a prompt's graph; longer prompts keep the GPU busy without one
WARM_UPS = 2  # eager runs before a capture, at most SPARE - 1: Triton compiles, cuBLAS makes its workspace


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding under way (session.py)."""

    tokens: torch.Tensor
    ids: torch.Tensor
    left: torch.Tensor
    run: Callable[[], object]


@dataclass(frozen=True)
class Prompt:
    """Prefill of prompts filled up to one length: write ``ids`` [B, T], ``last`` [1]; ``run()`` gives logits [B, V]."""

    ids: torch.Tensor
    last: torch.Tensor
    run: Callable[[], torch.Tensor | None]
    captured: bool = False


class GraphedStep:
    """A ``Step`` (session.py) whose runs are replays, captured when they are first needed.

    ``capture=False`` runs the same kernels one by one.
    """

    def __init__(self, decoder: Decoder, storage: Storage, capture: bool = True) -> None:
        self.step = GpuStep(decoder, storage)
        self.prompt = Prefill(self.step)
        self.capture = capture and decoder.device.type == "cuda"
        self.replays: dict[str, Callable[[], torch.Tensor | None]] = {}
        self.prompts: dict[int, Prompt] = {}  # by length
        self.pool: Any = None
        self.at = 0  # what ``length`` on the device is
        self.pads: torch.Tensor | None = None

    def __call__(self, tokens: torch.Tensor, length: int, pads: torch.Tensor | None) -> torch.Tensor:
        """As ``Step``."""
        run = self._ready("advance")
        self._place(length, pads)
        self.step.tokens.copy_(tokens)
        logits = run()
        assert logits is not None
        self.at = length + 1
        return logits

    def prefill(self, ids: torch.Tensor) -> torch.Tensor | None:
        """As ``PrefillingStep``."""
        self._place(0, None)
        length = ids.shape[1]
        size = self._filled(*ids.shape)
        if size is None:
            return self.prompt(ids)
        if size not in self.prompts:
            self.prompts[size] = self._prompt(ids.shape[0], size)
        elif not self.prompts[size].captured:  # a length that never comes again is not worth a capture
            known = self.prompts[size]
            run = self._graph(known.run, lambda: self.step.length.zero_())
            self.prompts[size] = replace(known, run=run, captured=True)
        prompt = self.prompts[size]
        prompt.ids[:, :length] = ids
        prompt.last.fill_(length - 1)
        logits = prompt.run()
        return None if logits is None else logits.clone()

    def _filled(self, batch: int, length: int) -> int | None:
        """The length that a prompt is filled up to; None where a graph is no use for it."""
        size = next((size for size in LENGTHS if size >= length), None)
        if size is None or not self.capture or batch * size > MOST_PROMPT_ROWS:
            return None
        return size if size <= self.step.attends[0].cache.shape[2] and self.prompt.fits(size) else None

    def start_greedy(
        self,
        tokens: torch.Tensor,
        unfinished: torch.Tensor,
        ends: torch.Tensor | None,
        pad: int,
        length: int,
        pads: torch.Tensor | None,
    ) -> Greedy:
        """As ``GreedyStep``."""
        run = self._ready("greedy")
        self._place(length, pads)
        self.step.pick.start(tokens, unfinished, ends, pad)
        self.at = -1  # it moves without us
        pick = self.step.pick
        return Greedy(pick.tokens, pick.ids, pick.left, run)

    def _place(self, length: int, pads: torch.Tensor | None) -> None:
        if self.at != length:
            self.step.length.fill_(length)
            self.at = length
        if pads is not self.pads:
            if pads is None:
                self.step.pads.zero_()
            else:
                self.step.pads.copy_(pads)
            self.pads = pads

    def _ready(self, name: str) -> Callable[[], torch.Tensor | None]:
        if name not in self.replays:
            run = getattr(self.step, name)
            self.replays[name] = self._captured(run) if self.capture else run
        return self.replays[name]

    def _captured(self, run: Callable[[], torch.Tensor | None]) -> Callable[[], torch.Tensor | None]:
        """Warm-up and capture write at the end of the cache, where nothing is kept that is not written again."""
        free = self.step.attends[0].cache.shape[2] - SPARE
        return self._graph(run, lambda: self.step.length.fill_(free))

    def _prompt(self, batch: int, size: int) -> Prompt:
        """What is cached for the tokens that fill up is written again before it is read."""
        with torch.inference_mode(False):
            ids = torch.zeros(batch, size, dtype=torch.long, device=self.step.length.device)
            last = torch.zeros(1, dtype=torch.long, device=ids.device)
        prompt = self.prompt  # not self: old steps and their graphs must go at once, not when Python looks for cycles
        return Prompt(ids, last, lambda: prompt(ids, last))

    def _graph(
        self, run: Callable[[], torch.Tensor | None], prepare: Callable[[], object]
    ) -> Callable[[], torch.Tensor | None]:
        device = self.step.length.device
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            prepare()
            for _ in range(WARM_UPS):  # on this stream: for each other one cuBLAS would keep a workspace
                run()
            graph = torch.cuda.CUDAGraph()
            with own_counters(device) as counters, torch.cuda.graph(graph, pool=self.pool):
                out = run()
            self.pool = self.pool or graph.pool()
        self.at = -1

        def replay(kept: torch.Tensor = counters) -> torch.Tensor | None:
            graph.replay()
            return out

        return replay
