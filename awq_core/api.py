"""All that a plugin may import; it imports no torch. What stands here follows ``PLUGIN_API``."""

from .capability import Capability, Reason
from .fusing import FusingMapping
from .hookspecs import PLUGIN_API, hookimpl
from .kernel import ANY_LAYOUT, Backend, Kernel, Normed, ResidentLayout, TritonSource, Weight
from .layouts import checkpoint_layout
from .layouts.base import Codes, Layout, dequantize
from .lazy import lazy
from .spec import Device, LinearSpec, Rows
from .tuning import tuned

__all__ = [
    "ANY_LAYOUT",
    "PLUGIN_API",
    "Backend",
    "Capability",
    "Codes",
    "Device",
    "FusingMapping",
    "Kernel",
    "Layout",
    "LinearSpec",
    "Normed",
    "Reason",
    "ResidentLayout",
    "Rows",
    "TritonSource",
    "Weight",
    "checkpoint_layout",
    "dequantize",
    "hookimpl",
    "lazy",
    "tuned",
]
