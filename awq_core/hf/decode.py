"""The fast decode step inside transformers: ``generate()`` and the model's forward take it where its conditions hold.

``attach(model, engine)``, which ``awq_fusers.decode.install`` calls, gives the model a class that differs from its own
in three methods, under the same name (as PyTorch's ``fully_shard`` does); ``detach(model)`` gives the old one back.

* ``_sample`` (greedy decoding and sampling): prefill through the model's own forward into static memory, then the
  loop of ``engine``.
* ``_beam_search``: transformers' own loop over the same memory.
* ``forward`` of one token after such a prefill: one step of ``engine``.

Everything else runs as before, and so do these three where a condition does not hold; ``why_not`` says which one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..notice import tell

Tensor = torch.Tensor

ENGINE = "_awq_decode"
LOOPS = ("_sample", "_beam_search")
# Arguments of a forward that a step has no use for, and the values that ask for nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "inputs_embeds": (None,),
    "labels": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "return_dict": (None, True),
    "use_cache": (None, True),
}
FREE = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep", "cache_position"}
KWARGS = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "cache_position"}


class StaticLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a session's memory as transformers' forward sees it: a layer that grows, and keeps everything."""

    is_croppable = False

    def __init__(self, session: Any, index: int) -> None:
        super().__init__()
        self.session, self.index = session, index
        self.length = 0
        self.is_initialized = True
        self._expose()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write at the end; all keys and values so far, [B, H, T, D]."""
        begin, end = self.length, self.length + key_states.shape[-2]
        storage = self.session.storage
        storage.keys(self.index)[:, :, begin:end] = key_states
        storage.values(self.index)[:, :, begin:end] = value_states
        self.length = end
        self._expose()
        if begin == 0:
            return key_states, value_states
        return self.keys.to(key_states.dtype), self.values.to(value_states.dtype)

    def get_seq_length(self) -> int:
        """Tokens cached."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """All layers are reordered at once by the cache."""

    def _expose(self) -> None:
        self.keys = self.session.storage.keys(self.index)[:, :, : self.length]
        self.values = self.session.storage.values(self.index)[:, :, : self.length]


class StaticMemory(Cache):  # type: ignore[misc]
    """A session's memory as a cache of transformers, for the length of one ``generate``; never handed to the user."""

    def __init__(self, session: Any) -> None:
        super().__init__(layers=[StaticLayer(session, i) for i in range(len(session.storage.layers))])
        self.session = session

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i becomes what sequence ``beam_idx[i]`` was."""
        self.session.reorder(beam_idx)

    def advanced(self) -> None:
        """The session has taken a step."""
        for layer in self.layers:
            layer.length = self.session.length

    def copied(self, config: Any) -> DynamicCache:
        """What a user may keep: a cache of its own memory."""
        copy = DynamicCache(config=config.get_text_config(decoder=True))
        dtype = self.session.decoder.dtype  # the memory's may be wider
        for index, layer in enumerate(self.layers):
            layer._expose()
            copy.update(layer.keys.to(dtype, copy=True), layer.values.to(dtype, copy=True), index)
        return copy


def attach(model: Any, engine: Any) -> None:
    """Let ``model`` decode through ``engine``, an ``awq_fusers.decode.engine.Engine`` that was made for it."""
    detach(model)
    model.__dict__[ENGINE] = engine
    if engine.known:
        kind: Any = type(model)
        model.__class__ = _class_with_step(kind)


def detach(model: Any) -> None:
    """Undo ``attach``; static memory is freed."""
    engine = model.__dict__.pop(ENGINE, None)
    if engine is not None:
        engine.release()
    if isinstance(model, FastDecode):
        model.__class__ = type(model)._without_step


def why_not(model: Any) -> str | None:
    """Why ``model`` has no fast decode step, to be read after "because"; None where it has one."""
    engine = model.__dict__.get(ENGINE)
    if engine is None:
        return "it was not asked for"
    reason: str | None = engine.refresh()
    return reason


class FastDecode:
    """The methods that ``attach`` puts before those of the model's own class."""

    _without_step: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the model's own class: the static memory belongs to one model."""
        state = {name: value for name, value in self.__dict__.items() if name != ENGINE}
        return _new, (self._without_step,), state

    def _sample(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return _generate(self, "_sample", input_ids, kwargs)

    def _beam_search(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return _generate(self, "_beam_search", input_ids, kwargs)


def _new(kind: Any) -> Any:
    return kind.__new__(kind)


@functools.cache
def _class_with_step(kind: Any) -> type:
    forward = kind.forward

    @functools.wraps(forward)
    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory = kwargs.get("past_key_values")
        if type(memory) is not StaticMemory:
            return forward(self, *args, **kwargs)
        step = None if args else _step_arguments(memory, kwargs)
        if step is not None:
            logits = memory.session.logits(step)
            memory.advanced()
            return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=memory)
        out = forward(self, *args, **kwargs)
        memory.session.start(memory.get_seq_length(), memory.session.pads)
        return out

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (FastDecode, kind), body | {"forward": stepping, "_without_step": kind})


def _step_arguments(memory: StaticMemory, kwargs: dict[str, Any]) -> Tensor | None:
    """The tokens [B], if this call is for one token of each sequence and asks for logits only."""
    ids, session = kwargs.get("input_ids"), memory.session
    if ids is None or ids.shape != (session.batch, 1) or not session.length or not session.room:
        return None
    if any(name not in FREE and value not in IDLE.get(name, ()) for name, value in kwargs.items()):
        return None
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape != (session.batch, session.length + 1):
        return None
    tokens: Tensor = ids[:, 0]
    return tokens


def _generate(model: Any, loop: str, ids: Tensor, kwargs: dict[str, Any]) -> Any:
    """``loop`` of the model's own class over a session's memory, or the engine's loop instead of it."""
    plain = functools.partial(getattr(model._without_step, loop), model, ids)
    engine = model.__dict__[ENGINE]
    config = kwargs["generation_config"]
    length = _length_if_fit(engine, ids, config, kwargs)
    pads = _left_padding(kwargs.get("attention_mask")) if length else None
    if not length or pads is False or engine.refresh() is not None:
        return plain(**kwargs)
    unsupported = type(engine).unsupported
    try:
        with engine.session(ids.shape[0], length) as session:
            if session is None:  # another thread generates with this model
                return plain(**kwargs)
            session.start(0, pads)
            kwargs["past_key_values"] = memory = StaticMemory(session)
            if loop == "_sample" and (quick := _quick(config, kwargs)) is not None:
                return _run(model, engine, session, ids, kwargs, *quick)
            out = plain(**kwargs)
            if getattr(out, "past_key_values", None) is memory:
                out.past_key_values = memory.copied(model.config)
            return out
    except unsupported as error:
        tell(f"this generate() runs without the fast decode step because {error}")
        kwargs["past_key_values"] = DynamicCache(config=model.config.get_text_config(decoder=True))
        return plain(**kwargs)


def _length_if_fit(engine: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> int:
    """How many tokens the cache must hold; 0 where this call must run as it would without us."""
    memory: Any = kwargs.get("past_key_values")
    fresh = type(memory) is DynamicCache and not getattr(memory, "_is_user_defined", False)
    ours = set(kwargs) - {"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"}
    fit = (
        fresh
        and memory.get_seq_length() == 0
        and not memory.offloading
        and kwargs.get("use_cache", True)
        and not kwargs.get("synced_gpus")
        and not config.is_assistant
        and not config.output_attentions
        and not config.output_hidden_states
        and config.prefill_chunk_size is None
        and ours <= KWARGS
        and kwargs.get("logits_to_keep", 1) == 1
        and ids.dim() == 2
        and ids.shape[1] > 0
        and ids.device == engine.model.device
        and not engine.model.training
        and not torch.is_autocast_enabled(ids.device.type)
    )
    if not fit:
        return 0
    length: int = config.max_length
    if engine.max_length is not None and length > engine.max_length:
        tell(
            f"this generate() may reach {length} tokens, more than fuse_max_seq_len={engine.max_length}: "
            "it runs without the fast decode step, slower and with the same answers"
        )
        return 0
    return length


def _left_padding(mask: Tensor | None) -> Tensor | bool | None:
    """How many tokens at the left of each row [B] are padding, None where none is; False where the mask has holes."""
    if mask is None:
        return None
    if mask.dim() != 2:
        return False
    seen = mask != 0
    pads = (~seen).sum(-1)
    if not bool((pads == seen.long().argmax(-1)).all()):
        return False
    return pads if bool(pads.any()) else None


def _quick(config: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The arguments of the engine's ``Choice`` and ``Stop``; None where transformers' own loop must run."""
    if config.return_dict_in_generate:
        return None
    stop: dict[str, Any] = {"max_length": config.max_length}
    others = []
    for one in kwargs["stopping_criteria"]:
        if type(one) is MaxLengthCriteria:
            stop["max_length"] = min(stop["max_length"], one.max_length)
        elif type(one) is EosTokenCriteria and "eos" not in stop:
            stop["eos"] = one.eos_token_id
        else:
            others.append(one)
            if hasattr(one, "eos_token_id"):
                return None
    if others:
        stop["others"] = functools.partial(_any_of, others)
    if "eos" in stop:
        if config._pad_token_tensor is None:
            return None
        stop["pad"] = int(config._pad_token_tensor)
    return {"processors": kwargs["logits_processor"] or None, "sample": bool(config.do_sample)}, stop


def _any_of(criteria: list[Callable[..., Tensor]], ids: Tensor) -> Tensor:
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    for one in criteria:
        done = done | one(ids, None)
    return done


def _run(
    model: Any, engine: Any, session: Any, ids: Tensor, kwargs: dict[str, Any], choice: Any, stop: dict[str, Any]
) -> Tensor:
    """Prefill through the model's own forward, then the engine's loop."""
    streamer = kwargs.get("streamer")
    logits = session.prefill(ids)
    if logits is None:
        inputs = {name: value for name, value in kwargs.items() if name in KWARGS}
        prompt = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **inputs)
        logits = model(**prompt, return_dict=True).logits[:, -1]
    if "eos" in stop:
        stop["eos"] = stop["eos"].to(ids.device)
    found: Tensor = engine.decode(session, ids, logits, choice, stop, None if streamer is None else streamer.put)
    if streamer is not None:
        streamer.end()
    return found
