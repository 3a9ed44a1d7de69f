"""Devices, problems and ranges of M as plain data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awq_core import spec
from awq_core.errors import ConfigError
from awq_core.spec import Device, LinearSpec, Rows


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu:avx512", Device("cpu", "any", "avx512")),
        ("cpu:avx2", Device("cpu", "any", "avx2")),
        ("cpu:generic", Device("cpu", "any", "generic")),
        ("cuda:sm75", Device("cuda", "nvidia", "sm75")),
        ("cuda:sm120", Device("cuda", "nvidia", "sm120")),
        ("hip:gfx942", Device("cuda", "amd", "gfx942")),
        ("hip:gfx90a", Device("cuda", "amd", "gfx90a")),
        ("hip:gfx1201", Device("cuda", "amd", "gfx1201")),
        ("mps", Device("mps", "apple")),
    ],
)
def test_parse(text, device):
    assert Device.parse(text) == device
    assert Device.parse(f"  {text.upper()} ") == device
    assert str(device) == text


def test_rocm_is_another_word_for_hip():
    assert Device.parse("rocm:gfx942") == Device.parse("hip:gfx942")


def test_cpu_without_more_is_this_cpu(monkeypatch):
    monkeypatch.setattr(spec, "local_cpu_arch", lambda: "avx2")
    assert Device.parse("cpu") == Device("cpu", "any", "avx2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "cpu:",
        "cpu:sm90",
        "cpu:0",
        "cuda",
        "cuda:",
        "cuda:0",
        "cuda:90",
        "cuda:sm9",
        "cuda:sm\N{FULLWIDTH DIGIT NINE}0",
        "cuda:gfx942",
        "hip",
        "hip:sm90",
        "hip:gfx",
        "hip:gfxzzz",
        "hip:gfx942:xnack-",
        "mps:",
        "mps:m1",
        "tpu",
        "cuda:sm90\0",
    ],
)
def test_parse_refuses_in_one_sentence(text):
    with pytest.raises(ConfigError) as caught:
        Device.parse(text)
    assert str(caught.value).startswith(f"device {text!r} is not understood: write cpu, cpu:avx512")


@given(st.text())
def test_any_text_is_a_device_or_a_config_error(text):
    try:
        device = Device.parse(text)
    except ConfigError:
        return
    assert Device.parse(str(device)) == device


def test_of_the_real_cpu():
    import torch

    device = Device.of(torch.device("cpu"))
    assert (device.type, device.arch) == ("cpu", spec.local_cpu_arch())
    assert Device.of(torch.device("cpu", 0)) == device == Device.parse("cpu")


def test_of_cuda_follows_the_current_device(monkeypatch):
    import torch

    class Properties:
        def __init__(self, index):
            self.major, self.minor, self.gcnArchName = 8, index, "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.version, "hip", None)
    spec._describe.cache_clear()
    try:
        for current in (0, 6):
            monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
            assert Device.of(torch.device("cuda")) == Device("cuda", "nvidia", f"sm8{current}")
        assert Device.of(torch.device("cuda", 9)) == Device("cuda", "nvidia", "sm89")
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert Device.of(torch.device("cuda", 1)) == Device("cuda", "amd", "gfx942")
        assert Device.of(torch.device("xpu", 0)) == Device("xpu", "intel")
    finally:
        spec._describe.cache_clear()


def test_spec_in_words():
    problem = LinearSpec(256, 64, 32, dtype="bfloat16", device=Device("cuda", "nvidia", "sm90"))
    assert problem.groups == 8
    assert str(problem) == "K=256 N=64 g=32 gemm bfloat16 on cuda:sm90"
    assert str(LinearSpec(256, 64, 32, experts=4)).endswith(" x4 experts")


@given(st.integers(1, 50), st.none() | st.integers(0, 50), st.integers(-5, 120))
def test_rows_contain_what_lies_between_their_ends(first, more, m):
    rows = Rows(first, None if more is None else first + more)
    assert (m in rows) == (m >= first and (more is None or m <= first + more))


def test_rows_in_words():
    assert [str(Rows()), str(Rows(3, 3)), str(Rows(2, 9)), str(Rows(9))] == ["1+", "3", "2-9", "9+"]


@pytest.mark.parametrize("ends", [(0,), (-1, 4), (5, 4), (1.0,), (1, 64.0), ("1",), (None,), (True,)])
def test_rows_that_are_no_range(ends):
    with pytest.raises(ValueError, match=r"^Rows\.(first|last) must be "):
        Rows(*ends)
