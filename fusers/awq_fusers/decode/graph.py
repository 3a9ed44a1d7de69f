"""The decode step as one CUDA graph: a replay costs the host a few microseconds, whatever the model's depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .gpu_step import GpuStep
from .model import Decoder
from .prefill import Prefill
from .storage import SPARE, Storage

WARM_UPS = 2  # eager runs before a capture, at most SPARE - 1: Triton compiles, cuBLAS makes its workspace


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding under way (session.py)."""

    tokens: torch.Tensor
    ids: torch.Tensor
    left: torch.Tensor
    run: Callable[[], object]


class GraphedStep:
    """A ``Step`` (session.py) whose runs are replays, captured when they are first needed.

    ``capture=False`` runs the same kernels one by one.
    """

    def __init__(self, decoder: Decoder, storage: Storage, capture: bool = True) -> None:
        self.step = GpuStep(decoder, storage)
        self.prompt = Prefill(self.step)
        self.capture = capture and decoder.device.type == "cuda"
        self.replays: dict[str, Callable[[], torch.Tensor | None]] = {}
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
        return self.prompt(ids)

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
        device = self.step.length.device
        free = self.step.attends[0].cache.shape[2] - SPARE
        with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self.step.length.fill_(free)
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                out = run()
            self.pool = self.pool or graph.pool()
        self.at = -1

        def replay() -> torch.Tensor | None:
            graph.replay()
            return out

        return replay
