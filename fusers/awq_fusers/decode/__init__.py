"""The fast decode path: one token of each sequence through the whole decoder, without transformers' overhead.

``model.py`` says what a decoder is, ``families.py`` reads one from a model, ``step.py`` (torch) and ``gpu_step.py``
(Triton, captured by ``graph.py``) run a step, ``loop.py`` makes sequences of steps, ``engine.py`` keeps all of it with
a model, and ``awq_core.hf.decode`` hangs it into transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..record import FusedRecord
    from .engine import Engine

__all__ = ["engine_for", "install", "int8_head", "uninstall"]


def install(model: Any, record: FusedRecord | None = None) -> None:
    """Let ``generate`` of ``model`` take the fast decode step wherever its conditions hold.

    ``awq_core.hf.decode.why_not(model)`` says whether they can hold at all. ``record`` is what was fused.
    """
    from awq_core.hf import decode

    decode.attach(model, engine_for(model, record))


def uninstall(model: Any) -> None:
    """Undo ``install``."""
    from awq_core.hf import decode

    decode.detach(model)


def engine_for(model: Any, record: FusedRecord | None = None, max_length: int | None = None) -> Engine:
    """The engine of ``model``, whose projections are joined as ``record`` says (None: as transformers made them).

    ``engine.reason`` says why there is no fast step for this model; None where there is one.
    """
    from .engine import Engine

    if record is None:
        return Engine(model, max_length=max_length)
    stand_ins = {}
    for layer in record.layers:
        for module, joined in ((layer.attention, layer.qkv), (layer.mlp, layer.gate_up)):
            if module is not None and joined is not None:
                stand_ins[module] = joined
    return Engine(model, stand_ins.get, max_length or record.max_seq_len)


def int8_head(model: Any, asked: bool = True) -> None:
    """Let the fast decode step read the output embedding in 8 bits: faster on a CPU, and not the same logits.

    The head's weight is copied to int8 with a scale for each row (1 byte a weight beside the model's own 2), and decode
    steps of up to four sequences use the copy; prompts do not. Logits change by about 1 % of their size, so a token may
    be another one where two were nearly alike. ``asked=False`` takes it back. Nothing of it is saved.

    Raises:
        ConfigError: the model has no fast decode step, or its head is no bfloat16 linear on a CPU.
    """
    from awq_core.errors import ConfigError
    from awq_core.hf import decode

    from .head import takes_int8

    reason = decode.why_not(model)
    if reason is not None:
        raise ConfigError(f"int8_head: this model has no fast decode step, because {reason}")
    engine: Engine = model.__dict__[decode.ENGINE]
    if asked and not (engine.decoder is not None and takes_int8(engine.decoder.head)):
        raise ConfigError("int8_head: the head is no bfloat16 linear on a CPU, and only that has an int8 kernel here")
    engine.read_head_in_int8(asked)
