"""For tests of awq-core and of backends: the conformance kit, and tiny checkpoints."""

from .conformance import BackendConformance

__all__ = ["BackendConformance"]
