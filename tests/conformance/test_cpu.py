from awq_core.testing import BackendConformance


class TestCpu(BackendConformance):
    backend = "cpu"
