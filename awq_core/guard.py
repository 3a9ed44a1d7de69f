"""Guards between the core and what plugins bring: records are checked when they are made, errors become one line."""

from __future__ import annotations

import reprlib


def require(ok: bool, field: str, wanted: str, got: object) -> None:
    """ValueError unless ``ok``. Records check themselves when they are made: what is wrong in a plugin then shows while
    that plugin loads, and not in the middle of a choice among the kernels of others.
    """
    if not ok:
        raise ValueError(f"{field} must be {wanted}, not {reprlib.repr(got)}")


def is_count(value: object) -> bool:
    """Whether this is a whole number of at least 1 (True is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def one_line(error: BaseException) -> str:
    """``ValueError: its text``, whatever the text is like."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error of a plugin, whose own text fails
        text = ""
    return f"{type(error).__name__}: {text or 'no message'}"
