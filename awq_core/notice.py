"""Things that the user should be told once, through the logger ``awq_core``."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("awq_core")


@functools.cache
def tell(message: str) -> None:
    """Log ``message`` as a warning, the first time only."""
    logger.warning(message)
