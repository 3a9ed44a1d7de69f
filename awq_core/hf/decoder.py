"""A model's decoder blocks, and how it calls them: found by running it up to the blocks, without its head."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, first_line
from ..quantization.call import Call


@dataclass(frozen=True)
class Decoder:
    """``model`` with its ``blocks``, the module list at ``path``."""

    model: Any
    path: str
    blocks: nn.ModuleList

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """Find the blocks: the module list with the most weights, but for lists inside a block.

        All other parameters become float32, so that what the model passes to its blocks is exact.
        """
        lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        outer = [(p, m) for p, m in lists if not any(p.startswith(f"{other}.") for other, _ in lists)]
        if not outer:
            raise CheckpointError(f"{type(model).__name__} has no list of blocks to calibrate: use --method rtn")
        path, blocks = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        inside = {id(p) for p in blocks.parameters()}
        head = model.get_output_embeddings()
        inside |= {id(p) for p in head.parameters()} if head is not None else set()
        embedding = model.get_input_embeddings()
        inside -= {id(p) for p in embedding.parameters()}
        for tensor in [*model.parameters(), *model.buffers()]:
            if id(tensor) not in inside and tensor.is_floating_point():
                tensor.data = tensor.data.float()
        return cls(model.eval(), path, blocks)

    def block(self, number: int) -> nn.Module:
        """A copy of a block in float32."""
        return copy.deepcopy(self.blocks[number]).float().requires_grad_(False)

    def calls(self, batches: Sequence[torch.Tensor]) -> list[list[Call]]:
        """How each block is called for each batch of token ids [B, T]: ``[block][batch]``; no block is run for it.

        Only the first block's calls hold true hidden states, the embedded tokens.

        Raises:
            CheckpointError: the blocks do not take hidden states and pass them on.
        """
        returned = self._returned(batches[0][:1, :1])
        found: list[list[Call]] = [[] for _ in self.blocks]
        for ids in batches:
            with self._stubs(returned) as stubs:
                self._run(ids)
            for number, stub in enumerate(stubs):
                if stub.call is None:
                    raise CheckpointError(
                        f"{self.path}.{number}: the model did not run this block after the one before, so its inputs "
                        "are not known: use --method rtn"
                    )
                found[number].append(stub.call)
        return found

    def _returned(self, ids: torch.Tensor) -> int:
        """How many elements the blocks return in a tuple; 0 where they return a tensor."""
        with self._stubs(0, stop_at=0) as stubs:
            self._run(ids)
        call = stubs[0].call
        if call is None:
            raise CheckpointError(f"{self.path}.0: the model did not run its first block: use --method rtn")
        with torch.no_grad():
            out = self.block(0)(call.hidden, *call.args, **call.kwargs)
        return len(out) if isinstance(out, tuple) else 0

    def _run(self, ids: torch.Tensor) -> None:
        try:
            with torch.no_grad():
                self.model(input_ids=ids.to(self.model.device), use_cache=False)
        except _Done:
            pass
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
            name = type(self.model).__name__
            raise CheckpointError(
                f"{name} cannot be calibrated block by block ({first_line(error)}): use --method rtn"
            ) from error

    @contextmanager
    def _stubs(self, returned: int, stop_at: int | None = None) -> Iterator[list[_Stub]]:
        last = len(self.blocks) - 1 if stop_at is None else stop_at
        real = list(self.blocks)
        stubs = [_Stub(block, returned, number == last) for number, block in enumerate(real)]
        try:
            for number, stub in enumerate(stubs):
                self.blocks[number] = stub
            yield stubs
        finally:
            for number, block in enumerate(real):
                self.blocks[number] = block


class _Done(Exception):  # noqa: N818 (no error: all blocks were called)
    pass


class _Stub(nn.Module):
    """Stands in for a block: notes how it is called and passes the hidden states on."""

    def __init__(self, block: nn.Module, returned: int, last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not as a child
        self.returned, self.last = returned, last
        self.call: Call | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # a model may look at its blocks, for the kind of attention

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [B, T, H], returned as they are."""
        self.call = Call(hidden_states, args, kwargs)
        if self.last:
            raise _Done
        return (hidden_states, *[None] * (self.returned - 1)) if self.returned else hidden_states
