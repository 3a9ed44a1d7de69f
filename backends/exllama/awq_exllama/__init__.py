"""ExLlama backend of awq-core: Triton, ExLlama-v2's word order, for GPUs of NVIDIA and AMD."""
