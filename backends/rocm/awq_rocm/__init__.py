"""ROCm backend of awq-core: Triton kernels with tiles of their own for CDNA and RDNA."""
