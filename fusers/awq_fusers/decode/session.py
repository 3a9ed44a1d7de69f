"""One generation at a time over static memory: how many tokens are cached, which are padding, and the next step."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from .model import Decoder
from .step import TorchStep
from .storage import SPARE, Storage


class Step(Protocol):
    """One decode step over the storage that it was made for."""

    def __call__(self, tokens: torch.Tensor, length: int, pads: torch.Tensor | None) -> torch.Tensor:
        """tokens [B] at position ``length`` (pads [B]: padding at the left, or None) to logits [B, V].

        The logits are good until the next call.
        """
        ...


class Greedy(Protocol):
    """Greedy decoding under way: ``run()`` is one step."""

    tokens: torch.Tensor
    """[B] the last choice."""
    ids: torch.Tensor
    """[B, ..] column t is the token at position t, for those that a step has chosen."""
    left: torch.Tensor
    """[1] how many sequences are not finished."""

    def run(self) -> object:
        """One step: choose the next tokens."""
        ...


@runtime_checkable
class GreedyStep(Protocol):
    """A step that can choose the next token itself."""

    def start_greedy(
        self,
        tokens: torch.Tensor,
        unfinished: torch.Tensor,
        ends: torch.Tensor | None,
        pad: int,
        length: int,
        pads: torch.Tensor | None,
    ) -> Greedy:
        """Greedy decoding that goes on from ``tokens`` [B] at position ``length``."""
        ...


@runtime_checkable
class PrefillingStep(Protocol):
    """A step that can prefill too."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor | None:
        """ids [B, T] into an empty cache, to the last logits [B, V]; None where it cannot."""
        ...


class Session:
    """The state of one ``generate`` over ``storage``. Prefill writes the storage and then says ``start``."""

    def __init__(self, decoder: Decoder, storage: Storage, step: Step | None = None) -> None:
        self.decoder, self.storage = decoder, storage
        self.batch, self.capacity = storage.batch, storage.capacity - SPARE
        self.step = step or make_step(decoder, storage)
        self.length = 0
        self.pads: torch.Tensor | None = None

    def start(self, length: int, pads: torch.Tensor | None = None) -> None:
        """``length`` tokens of each sequence are cached, of which ``pads`` [B] at the left are padding (None: none)."""
        self.length, self.pads = length, pads

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.capacity - self.length

    def prefill(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Cache the prompt ids [B, T] and give the logits [B, V] of what follows.

        None, and nothing done, where the model's own forward must do it.
        """
        step = self.step
        if not isinstance(step, PrefillingStep) or self.length or self.pads is not None or ids.shape[1] > self.room:
            return None
        logits = step.prefill(ids)
        if logits is not None:
            self.length = ids.shape[1]
        return logits

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cache ``tokens`` [B] and give the logits [B, V] of what follows; good until the next call."""
        if not self.room:
            raise IndexError(f"{self.length} tokens are cached, and there is no room for more")
        logits = self.step(tokens, self.length, self.pads)
        self.length += 1
        return logits

    def reorder(self, rows: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was (beam search)."""
        for layer in self.storage.layers:
            layer[:, :, : self.length] = layer[rows.to(layer.device), :, : self.length]
        if self.pads is not None:
            self.pads = self.pads[rows.to(self.pads.device)]


def make_step(decoder: Decoder, storage: Storage) -> Step:
    """The fastest step for the decoder's device."""
    if decoder.device.type == "cuda":
        try:
            from .graph import GraphedStep
        except ImportError:  # no Triton
            return TorchStep(decoder, storage)
        return GraphedStep(decoder, storage)
    if storage.batch == 1 and storage.dtype == torch.float32:
        from .row_step import RowStep

        return RowStep(decoder, storage)
    return TorchStep(decoder, storage)
