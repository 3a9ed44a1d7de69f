"""For tests of awq-core and of backends: tiny checkpoints, and the conformance kit."""
