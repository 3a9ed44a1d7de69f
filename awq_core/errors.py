"""The errors of awq-core: each says what is wrong, where, why, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dispatch import Decision


class AwqError(Exception):
    """Base of all errors that awq-core raises on purpose; its text is meant for the user, as it is."""


class ConfigError(AwqError, ValueError):
    """A quantization config, or an option that the user gave, breaks a rule."""


class LayoutError(AwqError, ValueError):
    """The bytes of a weight do not lie in any layout that we know, or not as their header says."""


class CheckpointError(AwqError, ValueError):
    """A checkpoint is missing, truncated, incomplete, holds NaN or inf, or could not be written."""


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, for a sentence of ours about it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class PluginError(AwqError, RuntimeError):
    """A plugin that was asked for by name could not be loaded."""


class NoKernelError(AwqError, RuntimeError):
    """No kernel takes the problem, or the one that the user forced refuses it.

    ``decision`` holds every candidate with all the reasons against it.
    """

    def __init__(self, message: str, decision: Decision | None = None) -> None:
        super().__init__(message)
        self.decision = decision
