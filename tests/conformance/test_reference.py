from awq_core.testing import BackendConformance


class TestReference(BackendConformance):
    backend = "reference"
