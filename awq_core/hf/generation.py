"""Loading a model with its tokenizer, letting it answer, and timing it: what ``awq generate`` and ``awq demo`` run."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, TextStreamer
from transformers.utils.logging import disable_progress_bar

from ..errors import AwqError, CheckpointError, ConfigError
from ..packed import DTYPE_NAMES, PackedModule
from .autoawq_options import TOKENIZER_FILES
from .config import AwqConfig
from .enable import enable

Write = Callable[[str], Any]


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def dtype(self) -> str:
        """Dtype of the activations."""
        return DTYPE_NAMES.get(self.model.dtype, str(self.model.dtype))

    @property
    def device(self) -> str:
        """Where the inputs go."""
        return str(self.model.device)


@dataclass(frozen=True)
class Answer:
    """A generated text and its times: seconds to the first token, and of all tokens after it."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.first_token_seconds

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None where there is only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    def speed(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_seconds": self.first_token_seconds,
            "prefill_tokens_per_second": self.prefill_rate,
            "decode_tokens_per_second": self.decode_rate,
        }

    def summary(self) -> str:
        """In one line."""
        decode = "" if self.decode_rate is None else f", then {self.decode_rate:.1f} tokens/s"
        return (
            f"{self.prompt_tokens} prompt tokens, first token after {self.first_token_seconds:.2f} s "
            f"({self.prefill_rate:.0f} tokens/s){decode} ({self.new_tokens} new tokens)"
        )


class Stopwatch(TextStreamer):  # type: ignore[misc]
    """A streamer that notes when each token comes, and hands text to ``write``."""

    def __init__(self, tokenizer: Any, write: Write | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take the prompt (once), then each new token."""
        self.times.append(time.perf_counter())
        if self.write is not None:
            super().put(value)

    def end(self) -> None:
        """Write out what is held back."""
        if self.write is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that will not change any more."""
        if self.write is not None:
            self.write(text)


def load(folder: Path, dtype: str | None = None, device: str | None = None, version: str | None = None) -> Loaded:
    """Load the model in ``folder``, dense or AWQ, by plain ``from_pretrained``, and its tokenizer.

    Raises:
        ConfigError: ``device`` is not in this machine, or ``version`` names no backend.
        CheckpointError: transformers cannot load the folder; its own reason is part of the sentence.
    """
    enable()
    if not sys.stderr.isatty():
        disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    place = device or ("cuda" if torch.cuda.is_available() else None)
    if place is not None:
        options["device_map"] = _checked(place)
    if version is not None:
        options["quantization_config"] = AwqConfig(version=version)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        there = any((folder / name).is_file() for name in TOKENIZER_FILES)
        why = _first_line(error) if there else "copy its tokenizer.json or tokenizer.model into the folder"
        raise CheckpointError(f"{folder} has no tokenizer that transformers can load: {why}") from error
    try:
        with warnings.catch_warnings():
            # That the request is merged into the checkpoint's config is what we want.
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except AwqError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {_first_line(error)}") from error
    return Loaded(model.eval(), tokenizer)


def prompt_ids(loaded: Loaded, prompt: str, chat: bool | None = None) -> torch.Tensor:
    """Token ids [1, S] of ``prompt``, in the chat template (None: where the tokenizer has one).

    ConfigError where a template is wanted and there is none, or where the prompt has no token.
    """
    tokenizer = loaded.tokenizer
    template = tokenizer.chat_template is not None
    if chat and not template:
        raise ConfigError("this tokenizer has no chat template: leave --chat out")
    text = prompt
    if template if chat is None else chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    else:
        ids = tokenizer(text, return_tensors="pt").input_ids
    if ids.shape[-1] == 0:
        raise ConfigError("the prompt is empty: give at least one word")
    found: torch.Tensor = ids.to(loaded.model.device)
    return found


def answer(
    loaded: Loaded, ids: torch.Tensor, max_new_tokens: int, write: Write | None = None, min_new_tokens: int = 0
) -> Answer:
    """Continue ``ids`` [1, S] greedily; text goes to ``write`` as it comes."""
    watch = Stopwatch(loaded.tokenizer, write)
    started = time.perf_counter()
    out = loaded.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=_pad(loaded),
        streamer=watch,
    )
    new = out[0, ids.shape[1] :]
    first, last = watch.times[1], watch.times[-1]
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text, ids.shape[1], len(new), first - started, last - first)


def prefill_rate(loaded: Loaded, tokens: int, repeats: int = 3) -> float:
    """Tokens per second of one forward over ``tokens`` tokens, the best of ``repeats``."""
    ids = torch.arange(tokens, device=loaded.model.device).unsqueeze(0) % loaded.model.config.vocab_size
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats + 1):  # the first one warms up
            started = time.perf_counter()
            loaded.model(ids, logits_to_keep=1)
            best = min(best, time.perf_counter() - started)
    return tokens / best


def memory(model: Any) -> tuple[int, int]:
    """Bytes of all weights in memory, and of the transformer's linears among them (output embedding left out)."""
    packed = {
        name: [t for weight in module.packed.values() for t in weight.tensors().values()]
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
    }
    linears = [tensor for tensors in packed.values() for tensor in tensors]
    head = model.get_output_embeddings()
    linears += [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    every = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers(), *linears]}
    return sum(map(_nbytes, every.values())), sum(map(_nbytes, linears))


def dense_from_gguf(file: Path, out: Path) -> None:
    """Write the model in a GGUF file as a dense bfloat16 safetensors folder, with its tokenizer."""
    where, name = file.parent, file.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _checked(place: str) -> str:
    """``place`` if a model can be put there."""
    if place == "auto":
        return place
    try:
        device = torch.device(place)
    except RuntimeError:
        raise ConfigError(f"device {place!r} is not understood: write cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {place!r}: this machine has no such GPU")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # meta, or a kind of device that this torch was built without
        raise ConfigError(f"device {place!r} cannot be used: {_first_line(error)}; write cpu or cuda") from None
    return place


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pad(loaded: Loaded) -> int | None:
    """A pad token, so that generate does not warn that it takes one itself (a single prompt is never padded)."""
    pad: int | None = loaded.tokenizer.pad_token_id
    if pad is None:
        end = loaded.model.generation_config.eos_token_id
        pad = end[0] if isinstance(end, list) else end
    return pad


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
