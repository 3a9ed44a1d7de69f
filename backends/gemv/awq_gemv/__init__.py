"""GEMV backend of awq-core: Triton, one row of activations at the speed of memory."""
