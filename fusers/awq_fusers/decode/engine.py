"""What is kept with a fused model: its decoder as data, the static memory, and one session a batch size."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .families import Joined, knows, listeners, nothing_joined, read
from .loop import Choice, Stop, decode
from .model import Decoder, Unsupported
from .session import Session
from .storage import SPARE, Storage, rounded

FIRST_CAPACITY = 512  # tokens that memory is made for at first; it grows to what a call needs


class Engine:
    """Sessions over one model, made when they are first needed; it holds nothing before.

    ``max_length``: the longest sequence (None: whatever fits in memory). One session is in use at a time.
    """

    unsupported = Unsupported

    def __init__(self, model: Any, joined: Joined = nothing_joined, max_length: int | None = None) -> None:
        self.model, self.joined, self.max_length = model, joined, max_length
        self.decoder: Decoder | None = None
        self.storage: Storage | None = None
        self.sessions: dict[int, Session] = {}
        self.reason: str | None = None
        self.int8_head = False
        self._marks: list[int] = []
        self._lock = threading.Lock()
        self.refresh()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Nothing: a copy or a pickle of the model has no engine."""
        return type(None), ()

    @property
    def known(self) -> bool:
        """Whether the model's family is one that we know, so that a reason may pass (it may move to another device)."""
        return knows(self.model)

    def refresh(self) -> str | None:
        """Look at the model again, and forget everything that no longer holds. Why there is no fast step, or None."""
        marks = list(_marks(self.model))
        if marks == self._marks:
            return self.reason
        self.release()
        self._marks = marks
        try:
            self.decoder, self.reason = replace(read(self.model, self.joined), int8_head=self.int8_head), None
        except Unsupported as error:
            self.decoder, self.reason = None, str(error)
        except AttributeError as error:  # a module without a part that its class always has
            self.decoder, self.reason = None, f"its modules are not as expected: {error}"
        return self.reason

    def read_head_in_int8(self, asked: bool) -> None:
        """From the next step on: whether the head is read in 8 bits where it can be (``int8_head``)."""
        with self._lock:
            self.int8_head, self._marks = asked, []
            self.refresh()

    def release(self) -> None:
        """Free the static memory and the graphs."""
        self.sessions.clear()
        self.storage = None

    @contextmanager
    def session(self, batch: int, length: int) -> Iterator[Session | None]:
        """A session for ``batch`` sequences of up to ``length`` tokens; None while another one is in use.

        Unsupported where there is no fast step, or no memory for it.
        """
        if not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            with _on(self.decoder):
                yield self._session(batch, length)
        finally:
            self._lock.release()

    def decode(
        self,
        session: Session,
        ids: torch.Tensor,
        logits: torch.Tensor,
        choice: dict[str, Any],
        stop: dict[str, Any],
        put: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """``loop.decode``, its ``Choice`` and ``Stop`` given as keywords."""
        return decode(session, ids, logits, Choice(**choice), Stop(**stop), put)

    def _session(self, batch: int, length: int) -> Session:
        if self.decoder is None:
            raise Unsupported(self.reason or "it was not read")
        storage = self.storage
        if storage is None or storage.batch < batch or storage.capacity < length + SPARE:
            held = (storage.batch, storage.capacity) if storage is not None else (1, min(FIRST_CAPACITY, self._most()))
            self.release()
            del storage
            try:
                self.storage = Storage(self.decoder, max(batch, held[0]), rounded(max(length + SPARE, held[1])))
            except torch.OutOfMemoryError:
                raise Unsupported(f"there is no memory for a cache of {batch} x {length} tokens") from None
        assert self.storage is not None
        if batch not in self.sessions:
            self.sessions[batch] = Session(self.decoder, self.storage.first(batch))
        return self.sessions[batch]

    def _most(self) -> int:
        return self.max_length or FIRST_CAPACITY


def _on(decoder: Decoder | None) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    if decoder is None or decoder.device.type != "cuda":
        return nullcontext()
    return torch.cuda.device(decoder.device)


def _marks(model: nn.Module) -> Iterator[int]:
    """What must stay as it is for a session to hold: the modules, what listens in, and where their tensors lie."""
    for module in model.modules():
        yield id(module)
        yield listeners(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor.data_ptr()
