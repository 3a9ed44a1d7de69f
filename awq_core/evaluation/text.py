"""The text that is evaluated, and the windows that a model sees of it.

The default text is the beginning of *Persuasion* (Jane Austen, 1818), which is in the public domain: about a quarter of
the novel, paragraphs un-wrapped. awq-core calibrates on nothing of it, so that it is held out for its own checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from ..errors import ConfigError

DEFAULT_NAME = "the beginning of Persuasion (Jane Austen, public domain)"


@dataclass(frozen=True)
class Windows:
    """Pieces of a text that are evaluated, each on its own.

    ``ids`` [W, context] int64; ``first`` [W]: the first position of each window that is predicted and counted. Position
    0 never is, as nothing comes before it; where windows overlap, neither is what the window before has counted.
    """

    ids: torch.Tensor
    first: tuple[int, ...]
    stride: int

    @property
    def context(self) -> int:
        """Tokens of one window."""
        return self.ids.shape[1]

    @property
    def predictions(self) -> int:
        """Tokens that are predicted and counted, of all windows."""
        return sum(self.context - first for first in self.first)


def read_text(file: Path | None) -> str:
    """The text in ``file`` (UTF-8), or the default one. ConfigError where it is not text or empty."""
    if file is None:
        return (files("awq_core.evaluation") / "persuasion.txt").read_text("utf-8")
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}): give a plain text file") from error
    if not text.strip():
        raise ConfigError(f"{file} is empty: give a text of a few thousand words")
    return text


def cut_windows(ids: torch.Tensor, context: int, stride: int | None = None, count: int | None = None) -> Windows:
    """Cut the tokens ``ids`` [T] into windows of ``context`` tokens that begin ``stride`` tokens apart.

    A stride equal to the context (the default) makes the windows independent; a smaller one gives each counted token at
    least ``context - stride`` tokens before it. ``count`` windows are taken, spread evenly over the text (default: all;
    no more than there are). Tokens after the last whole window are left out.

    Raises:
        ConfigError: the context or the stride makes no sense, or the text is shorter than one window.
    """
    stride = context if stride is None else stride
    if context < 2:
        raise ConfigError(f"context is {context}: a window needs 2 tokens at least, one to predict and one before it")
    if not 1 <= stride <= context:
        raise ConfigError(f"stride is {stride}: it must lie between 1 and the context ({context})")
    if count is not None and count < 1:
        raise ConfigError(f"windows is {count}: evaluate one at least")
    total = 0 if len(ids) < context else (len(ids) - context) // stride + 1
    if total == 0:
        raise ConfigError(
            f"the text has {len(ids)} tokens and one window needs {context}: give a longer text or a smaller context"
        )
    taken = total if count is None else min(count, total)
    numbers = [round(i * (total - 1) / max(1, taken - 1)) for i in range(taken)]
    pieces = torch.stack([ids[n * stride : n * stride + context] for n in numbers])
    return Windows(pieces, tuple(max(1, context - stride) if n else 1 for n in numbers), stride)
