"""The CPU backend of awq-core: PyTorch's own int4 kernel, a fast prefill on the same bytes, dense for fp32 and fp16."""
