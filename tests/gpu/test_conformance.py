"""Every declared cell of the GPU backends, on a GPU (elsewhere tests/conformance/test_gpu_sample.py runs a sample)."""

import pytest
import torch

from awq_core.testing import BackendConformance

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)


class TestGemm(BackendConformance):
    backend = "gemm"


class TestGemv(BackendConformance):
    backend = "gemv"
