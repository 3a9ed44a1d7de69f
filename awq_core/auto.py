"""``import awq_core.auto`` is ``awq_core.enable()`` in one line."""

from .hf.enable import enable

enable()
