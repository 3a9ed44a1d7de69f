"""The user's word: version beats prefer beats the environment."""

import threading

import pytest

from awq_core.request import Request, current_request, prefer


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("AWQ_CORE_BACKEND", raising=False)
    monkeypatch.delenv("AWQ_CORE_DISABLE", raising=False)


def test_nothing_was_asked():
    assert current_request() == current_request(None) == current_request("  ") == Request()


def test_version_forces_in_any_case():
    wanted = Request("gemv", 'AwqConfig(version="gemv")')
    assert current_request("gemv") == current_request(" GEMV ") == wanted


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("AWQ_CORE_BACKEND", " GEMM ")
    assert current_request() == Request("gemm", "AWQ_CORE_BACKEND=gemm")
    monkeypatch.setenv("AWQ_CORE_BACKEND", " ")
    assert current_request() == Request()


def test_the_order_of_the_words(monkeypatch):
    monkeypatch.setenv("AWQ_CORE_BACKEND", "cpu")
    assert current_request("gemv").forced == "gemv"
    with prefer("acme"):
        assert current_request() == Request(preferred=("acme",))
        assert current_request("gemv") == Request("gemv", 'AwqConfig(version="gemv")', ("acme",))
    assert current_request().forced == "cpu"


def test_prefer_nests_and_ends():
    with prefer("A", " b "):
        assert current_request().preferred == ("a", "b")
        with prefer("c"):
            assert current_request().preferred == ("c",)
        assert current_request().preferred == ("a", "b")

    def fails():
        with prefer("d"):
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert current_request() == Request()


def test_prefer_holds_for_its_own_thread():
    seen = []
    with prefer("a"):
        thread = threading.Thread(target=lambda: seen.append(current_request().preferred))
        thread.start()
        thread.join()
    assert seen == [()]


def test_disabled_names(monkeypatch):
    monkeypatch.setenv("AWQ_CORE_DISABLE", " cpu, ,GEMM.tiled,")
    assert current_request().disabled == {"cpu", "gemm.tiled"}
    with prefer("a"):
        assert current_request("b").disabled == {"cpu", "gemm.tiled"}
