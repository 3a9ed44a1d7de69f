"""What a quantization run is asked to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

# The search as the paper and AutoAWQ have it: scales, clipping but for q and k, rounding to nearest.
PAPER: dict[str, Any] = {"coarse": False, "clip_qk": False, "feedback": False, "propagate": False, "correct": 0.0}


@dataclass(frozen=True)
class Settings:
    """The options of the AWQ search; the defaults are those that measured best (``benchmarks/quantize.py``).

    * ``scale_steps``: ratios that the scale search tries (0: no scales), ``duo_scaling`` as in AutoAWQ
    * ``coarse``: try every fourth ratio first, then those beside the best one
    * ``clip``: search for tighter ranges; ``clip_qk`` for q and k too, which the paper leaves alone
    * ``feedback``: round with error feedback instead of to nearest; ``damping`` of its second moments
    * ``propagate``: take the moments of each block's inputs from the blocks quantized before it
    * ``correct``: share of the error of their input that the weights make up for before they are rounded (needs
      ``propagate``); ``correct_damping`` holds them near what they were
    * ``tie_heads``: scale v and o under grouped-query attention too, with one scale for all heads that share a v
    """

    zero_point: bool = True
    scale_steps: int = 20
    duo_scaling: bool = True
    coarse: bool = True
    clip: bool = True
    clip_qk: bool = True
    feedback: bool = True
    damping: float = 0.2
    propagate: bool = False
    correct: float = 0.0
    correct_damping: float = 0.1
    tie_heads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.scale_steps <= 1000:
            raise ConfigError(f"scale_steps is a count from 0 to 1000, not {self.scale_steps}")
        if not 0 < self.damping <= 100 or not 0 < self.correct_damping <= 100:
            raise ConfigError("damping and correct_damping are factors above 0, of the mean second moment")
        if not 0 <= self.correct <= 1:
            raise ConfigError(f"correct is a share from 0 to 1, not {self.correct}")
        if self.correct and not self.propagate:
            raise ConfigError("correct makes up for the errors of earlier blocks and needs propagate=True")

    @classmethod
    def of(cls, options: dict[str, Any]) -> Settings:
        """From keywords; ConfigError names the first that does not exist."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ConfigError(f"quantize has no option {unknown[0]!r}; those of the search: {', '.join(sorted(known))}")
        return cls(**options)

    def record(self) -> dict[str, Any]:
        """Plain data, for the checkpoint's config."""
        return asdict(self)
