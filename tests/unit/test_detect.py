"""Layouts from headers: every layout and size is found again, and what fits nothing is named."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_core.errors import LayoutError
from awq_core.layouts import NAMES, checkpoint_layout
from awq_core.layouts.detect import Detected, ModuleHeader, TensorHeader, detect, reconcile_version

FILE = "model-00001-of-00002.safetensors"
NAME = "model.layers.0.mlp.down_proj"


def header(layout: str, k: int, n: int, g: int, bias: bool = False, dtype: str = "float16") -> ModuleHeader:
    tensors = {
        suffix: TensorHeader(dtype if dtype in spec.dtypes else spec.dtypes[0], spec.shape, FILE)
        for suffix, spec in checkpoint_layout(layout).shapes(k, n, g).items()
    }
    if bias:
        tensors["bias"] = TensorHeader("float16", (n,), FILE)
    return ModuleHeader(NAME, tensors)


def raw(**tensors: tuple[str, tuple[int, ...]]) -> ModuleHeader:
    return ModuleHeader(NAME, {suffix: TensorHeader(dtype, shape, FILE) for suffix, (dtype, shape) in tensors.items()})


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from((16, 32, 64, 128, 256, -1)),
    st.booleans(),
    st.sampled_from(("float16", "bfloat16")),
    st.booleans(),
)
def test_what_is_stored_is_found(layout: str, a: int, b: int, claim: int, bias: bool, dtype: str, known: bool) -> None:
    k, n = 64 * a, 64 * b
    g = k if claim == -1 else claim
    if checkpoint_layout(layout).refuses(k, n, g) is not None:
        return
    module = header(layout, k, n, g, bias, dtype)
    assert detect(module, claim, (k, n) if known else None) == Detected(layout, k, n, g, bias)


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("size", [512, 896, 4096])
def test_square_weights(layout: str, size: int) -> None:
    for claim in (64, 128):
        assert detect(header(layout, size, size, claim), claim) == Detected(layout, size, size, claim, False)


def test_square_gemm_and_gemv_share_the_shape_of_qweight() -> None:
    gemm, gemv = header("gemm", 512, 512, 128), header("gemv", 512, 512, 128)
    assert gemm.tensors["qweight"] == gemv.tensors["qweight"]
    assert (detect(gemm, 128).layout, detect(gemv, 128).layout) == ("gemm", "gemv")


@pytest.mark.parametrize("layout", ["gemm", "marlin"])
def test_the_header_beats_the_claimed_group_size(layout: str) -> None:
    found = detect(header(layout, 256, 128, 64), 128)
    assert found.group_size == 64
    assert found.notes == ("the config says group_size 128, but the tensors have 64: 64 is used",)
    assert detect(header(layout, 256, 128, 64)).notes == ()


@pytest.mark.parametrize("layout", ["gemv", "gemv_fast", "llm_awq"])
def test_padded_layouts_take_the_claim_if_it_fits_else_the_only_one_that_does(layout: str) -> None:
    few = header(layout, 1024, 64, 128)  # 8 columns: g 128, 256, 512 and 1024 all fit
    for claim, g in ((128, 128), (256, 256), (-1, 1024)):
        assert detect(few, claim) == Detected(layout, 1024, 64, g, False)
    for claim in (None, 64):
        with pytest.raises(LayoutError, match=r"fits the group sizes 128, 256, 512, 1024.*set group_size"):
            detect(few, claim)
    many = header(layout, 11008, 64, 128)  # 88 columns: only 86 groups fit
    assert detect(many).group_size == 128
    found = detect(many, 64)
    assert found.group_size == 128
    assert "says group_size 64, but the tensors have 128" in found.notes[0]


def test_group_32_padded_over_four_words() -> None:
    assert detect(header("gemv", 64, 8, 32)).group_size == 32  # 2 groups in 32 columns


def test_the_model_wants_another_size() -> None:
    with pytest.raises(LayoutError) as caught:
        detect(header("gemm", 256, 128, 64), 64, (512, 128))
    text = str(caught.value)
    assert text.startswith(f"{FILE}: {NAME} is gemm with in_features 256 and out_features 128")
    assert "model wants in_features 512 and out_features 128" in text
    assert "qweight int32 [512, 16]" in text


def test_what_fits_nothing_names_file_module_found_and_wanted() -> None:
    tensors = dict(header("gemm", 256, 128, 64).tensors)
    tensors["scales"] = TensorHeader("float16", (4, 120), FILE)
    with pytest.raises(LayoutError) as caught:
        detect(ModuleHeader(NAME, tensors), 64)
    text = str(caught.value)
    for part in (
        FILE,
        NAME,
        "scales float16 [4, 120]",
        "gemm with K=256 N=128 g=64 wants",
        "float32 [4, 128]",
        "gemv with K=128 N=256",
    ):
        assert part in text


G = ("float16", (2, 128))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (raw(qweight=("int32", (256, 32)), qzeros=("int32", (2, 32)), scales=G), "fit 8 bits"),
        (raw(qweight=("int32", (256, 12)), qzeros=("int32", (2, 12)), scales=G), "fit 3 bits"),
        (raw(qweight=("int32", (32, 128)), qzeros=("int32", (2, 16)), scales=G), "looks like GPTQ"),
        (
            raw(qweight=("int32", (32, 128)), g_idx=("int32", (256,)), qzeros=("int32", (2, 16)), scales=G),
            "g_idx shows",
        ),
        (raw(qweight=("int32", (100, 16)), qzeros=("int32", (3, 16)), scales=("float16", (3, 128))), "not a multiple"),
        (raw(qweight=("uint8", (4, 4)), qzeros=("uint8", (4, 4)), scales=G), "found qweight uint8 [4, 4]"),
        (raw(qweight=("int32", (4,)), qzeros=("int32", ()), scales=G), "AWQ wants a qweight [rows, columns]"),
        (raw(qweight=("int16", (0, 0)), qzeros=G, scales=G), "gemv_fast would need K=0"),
        (raw(scales=G), "AWQ wants a qweight [rows, columns]"),
        (raw(qweight=("int32", (256, 16)), qzeros=("int32", (2, 16))), "gemm with K=256 N=128 g=128 wants"),
    ],
)
def test_causes_are_guessed(module: ModuleHeader, words: str) -> None:
    with pytest.raises(LayoutError) as caught:
        detect(module, 128)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{FILE}: {NAME} lies in no AWQ layout")


def test_eight_bit_gemv_shows_once_the_model_is_known() -> None:
    module = raw(qweight=("int32", (128, 64)), qzeros=("int32", (128, 1)), scales=("float16", (128, 8)))
    assert detect(module, 128).in_features == 512
    with pytest.raises(LayoutError, match=r"model wants in_features 256 .* the shapes fit 8 bits"):
        detect(module, 128, (256, 128))


def test_a_bias_of_another_length() -> None:
    module = header("gemm", 256, 128, 64, bias=True)
    wrong = ModuleHeader(NAME, {**module.tensors, "bias": TensorHeader("float16", (127,), FILE)})
    with pytest.raises(LayoutError, match=r"down_proj.bias is float16 \[127\], but gemm with N=128 wants \[128\]"):
        detect(wrong, 64)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.dictionaries(
        st.sampled_from(("qweight", "qzeros", "scaled_zeros", "scales", "bias", "g_idx")),
        st.tuples(
            st.sampled_from(("int32", "int16", "float16", "bfloat16", "uint8")),
            st.lists(st.sampled_from((0, 1, 2, 7, 8, 16, 64, 128)), max_size=3).map(tuple),
        ),
    ),
    st.sampled_from((None, -5, -1, 0, 1, 32, 128)),
    st.sampled_from((None, (0, 0), (128, 64))),
)
def test_any_header_is_detected_or_a_layout_error(
    tensors: dict[str, tuple[str, tuple[int, ...]]], claim: int | None, in_out: tuple[int, int] | None
) -> None:
    module = raw(**tensors)
    try:
        found = detect(module, claim, in_out)
    except LayoutError:
        return
    specs = checkpoint_layout(found.layout).shapes(found.in_features, found.out_features, found.group_size)
    assert all(module.tensors[suffix].shape == spec.shape for suffix, spec in specs.items())


@pytest.mark.parametrize(
    ("version", "backend", "layout"),
    [
        ("gemm", "autoawq", "gemm"),
        ("GEMM", None, "gemm"),
        ("exllama", None, "gemm"),
        ("ipex", "autoawq", "gemm"),
        ("gemv-fast", None, "gemv_fast"),
        ("GEMV_FAST", None, "gemv_fast"),
        ("gemv", "llm-awq", "llm_awq"),
        ("gemv", "LLM_AWQ", "gemv"),
        ("llm-awq", None, "llm_awq"),
        (None, None, "marlin"),
    ],
)
def test_versions_that_tell_the_truth(version: str | None, backend: str | None, layout: str) -> None:
    assert reconcile_version(version, backend, layout) is None


@pytest.mark.parametrize(
    ("version", "backend", "layout", "said"),
    [
        ("gemv", "llm-awq", "gemm", "version 'gemv' and backend 'llm-awq'"),
        ("GEMM", "autoawq", "gemv", "version 'GEMM'"),
        ("exllama", None, "gemv", "version 'exllama'"),
        ("acme", None, "gemm", "version 'acme'"),
        (None, "llm-awq", "gemm", "backend 'llm-awq'"),
    ],
)
def test_versions_that_lie(version: str | None, backend: str | None, layout: str, said: str) -> None:
    note = reconcile_version(version, backend, layout)
    assert note == f"the quantization_config says {said}, but the tensors lie in the {layout} layout: {layout} is used"


def test_headers_need_no_torch() -> None:
    code = (
        "import sys; from awq_core.layouts import NAMES, checkpoint_layout; import awq_core.checkpoint; "
        "[checkpoint_layout(n).shapes(256, 256, 128) for n in NAMES]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
