"""GEMM backend of awq-core: Triton, tensor cores, one resident layout for every number of rows."""
