"""Every declared cell of the GPU backends, on a GPU (elsewhere tests/conformance/test_gpu_sample.py runs a sample)."""

import pytest
import torch

from awq_core.testing import BackendConformance

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)


class TestExllama(BackendConformance):
    backend = "exllama"


class TestGemm(BackendConformance):
    backend = "gemm"


class TestGemv(BackendConformance):
    backend = "gemv"


@pytest.mark.skipif(torch.version.hip is None, reason="needs a GPU of AMD")
class TestRocm(BackendConformance):
    backend = "rocm"
