"""Each layout against a naive reading of its definition, and both ways bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_core.errors import LayoutError
from awq_core.layouts import NAMES, Codes, checkpoint_layout, dequantize

FAST = settings(max_examples=40, deadline=None, database=None)
PADDED = ("gemv", "gemv_fast", "llm_awq")
UNIT_N = {"gemm": 8, "gemv": 8, "gemv_fast": 8, "llm_awq": 8, "marlin": 64}
UNIT_K = {"gemm": 1, "gemv": 8, "gemv_fast": 64, "llm_awq": 64, "marlin": 16}


def make(
    name: str, k: int, n: int, g: int, seed: int = 0, dtype: torch.dtype = torch.float16, zero: int | None = None
) -> Codes:
    rng = torch.Generator().manual_seed(seed)
    zero = 8 if name == "marlin" else zero
    zeros = torch.randint(0, 16, (k // g, n), generator=rng, dtype=torch.uint8)
    if zero is not None:
        zeros.fill_(zero)
    scales = (torch.rand(k // g, n, generator=rng) * 0.05 + 1e-3).to(dtype)
    return Codes(torch.randint(0, 16, (k, n), generator=rng, dtype=torch.uint8), zeros, scales)


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, int, int, int, Codes]:
    name = draw(st.sampled_from(NAMES))
    g = draw(st.sampled_from((32, 64, 128, 256, "K") if name in PADDED else (16, 32, 64, 128, "K")))
    if g == "K":
        k = g = 128 * draw(st.integers(1, 3)) if name in PADDED else 16 * draw(st.integers(1, 9))
    else:
        step = np.lcm(g, UNIT_K[name])
        k = int(step) * draw(st.integers(1, 9))
    n = UNIT_N[name] * draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([getattr(torch, d) for d in checkpoint_layout(name).shapes(k, n, g)["scales"].dtypes]))
    zero = draw(st.sampled_from((None, 0, 15)))
    return name, k, n, g, make(name, k, n, g, draw(st.integers(0, 2**32)), dtype, zero)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


@FAST
@given(problems())
def test_pack_and_unpack_are_inverse_bit_for_bit(problem: tuple[str, int, int, int, Codes]) -> None:
    name, k, n, g, codes = problem
    layout = checkpoint_layout(name)
    given_codes = [codes.codes.clone(), codes.zeros.clone(), codes.scales.clone()]
    tensors = layout.pack(codes)
    for old, new in zip(given_codes, (codes.codes, codes.zeros, codes.scales), strict=True):
        assert same_bits(old, new)
    specs = layout.shapes(k, n, g)
    assert specs.keys() == tensors.keys() == layout.out_axis.keys()
    for suffix, spec in specs.items():
        assert tuple(tensors[suffix].shape) == spec.shape
        assert str(tensors[suffix].dtype).removeprefix("torch.") in spec.dtypes
        assert tensors[suffix].is_contiguous()

    before = {suffix: tensor.clone() for suffix, tensor in tensors.items()}
    back = layout.unpack(tensors, k, n, g)
    assert all(same_bits(before[suffix], tensors[suffix]) for suffix in tensors)
    assert same_bits(back.codes, codes.codes)
    assert same_bits(back.zeros, codes.zeros)
    assert same_bits(back.scales, codes.scales)
    assert back.group_size == g
    assert (back.scaled_zeros is not None) == (name in ("gemv_fast", "llm_awq"))

    again = layout.pack(back)
    assert all(same_bits(before[suffix], again[suffix]) for suffix in before)


@FAST
@given(problems(), st.integers(0, 2**32))
def test_every_word_survives_not_only_those_we_packed(problem: tuple[str, int, int, int, Codes], seed: int) -> None:
    name, k, n, g, codes = problem
    layout = checkpoint_layout(name)
    tensors = layout.pack(codes)
    weight = tensors["qweight"]
    info = torch.iinfo(weight.dtype)
    rng = torch.Generator().manual_seed(seed)
    tensors["qweight"] = torch.randint(info.min, info.max, weight.shape, generator=rng).to(weight.dtype)
    back = layout.unpack(tensors, k, n, g)
    assert int(back.codes.max()) <= 15
    assert same_bits(layout.pack(back)["qweight"], tensors["qweight"])


# The definitions, read one nibble at a time: for input k and output n, which nibble of which word.


def naive_place(name: str, k: int, n: int, columns: dict[tuple[int, int], int]) -> tuple[int, int, int]:
    """(row of qweight, column of qweight, nibble) of input k and output n."""
    if name == "gemm":
        return k, n // 8, [0, 2, 4, 6, 1, 3, 5, 7].index(n % 8)
    if name == "gemv":
        return n, k // 8, k % 8
    if name == "marlin":
        chunk, tile_n = divmod(n, 64)
        position = columns[k % 16, tile_n]
        return k // 16, chunk * 128 + position // 8, position % 8
    # gemv_fast, llm_awq: follow one row's 32 inputs through the reorderings of the packer.
    first = [i for b in range(4) for a in range(4) for i in (8 * a + 2 * b, 8 * a + 2 * b + 1)]
    second = [first[8 * e + i] for e in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    in_row = 32 * (k % 64 // 32) + second.index(k % 32)
    in_block = 64 * (n % 4) + in_row
    return n // 4, 64 * (k // 64) + in_block // 4, in_block % 4


def marlin_positions() -> dict[tuple[int, int], int]:
    """Where (row of a tile, column of four tiles) lies among the 1024 nibbles: Marlin's permutation, lane by lane."""
    order = []
    for lane in range(32):
        fragment = [
            16 * row + lane // 4 + 8 * block
            for block in (0, 1)
            for row in (2 * (lane % 4), 2 * (lane % 4) + 1, 2 * (lane % 4) + 8, 2 * (lane % 4) + 9)
        ]
        for tile in range(4):
            eight = [element + 256 * tile for element in fragment]
            order += [eight[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert sorted(order) == list(range(1024))
    # An element's number: 256 for a tile, 16 for a row, 1 for a column of the tile.
    return {(e % 256 // 16, 16 * (e // 256) + e % 16): position for position, e in enumerate(order)}


def naive_weight(name: str, tensors: dict[str, torch.Tensor], k: int, n: int, g: int) -> np.ndarray:
    """The dense weight [K, N], element by element in Python integers and float64."""
    positions = marlin_positions()
    mask = 0xFFFF if tensors["qweight"].dtype == torch.int16 else 0xFFFFFFFF
    words = tensors["qweight"].numpy().astype(np.int64) & mask
    scales = tensors["scales"].to(torch.float64).numpy()
    if name == "marlin":
        order = [i + 8 * j for i in range(8) for j in range(8)]
        if g == k:
            order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
        plain = np.empty_like(scales).reshape(-1, len(order))
        plain[:, order] = scales.reshape(-1, len(order))
        scales = plain.reshape(scales.shape)
    out = np.empty((k, n))
    for i in range(k):
        for j in range(n):
            row, column, nibble = naive_place(name, i, j, positions)
            q, group = (int(words[row, column]) >> (4 * nibble)) & 15, i // g
            scale = scales[j, group] if name == "gemv" else scales[group, j]
            if name in ("gemv_fast", "llm_awq"):
                out[i, j] = q * scale + float(tensors["qzeros" if name == "gemv_fast" else "scaled_zeros"][group, j])
                continue
            zero = 8
            if name == "gemm":
                word = int(tensors["qzeros"][group, j // 8]) & 0xFFFFFFFF
                zero = word >> (4 * [0, 2, 4, 6, 1, 3, 5, 7].index(j % 8)) & 15
            elif name == "gemv":
                zero = (int(tensors["qzeros"][j, group // 8]) & 0xFFFFFFFF) >> (4 * (group % 8)) & 15
            out[i, j] = (q - zero) * scale
    return out


@pytest.mark.parametrize("zero", [None, 0, 15])
@pytest.mark.parametrize(
    ("name", "k", "n", "g"),
    [
        ("gemm", 48, 24, 16),
        ("gemm", 64, 16, 64),
        ("gemv", 96, 16, 32),
        ("gemv", 128, 8, 128),
        ("gemv_fast", 192, 16, 64),
        ("llm_awq", 128, 8, 32),
        ("llm_awq", 256, 8, 256),
        ("marlin", 32, 128, 16),
        ("marlin", 48, 64, 48),
    ],
)
def test_dequantize_is_the_definition(name: str, k: int, n: int, g: int, zero: int | None) -> None:
    layout = checkpoint_layout(name)
    codes = make(name, k, n, g, seed=k + n, zero=zero)
    tensors = layout.pack(codes)
    want = naive_weight(name, tensors, k, n, g)
    for found in (dequantize(codes, torch.float32), dequantize(layout.unpack(tensors, k, n, g), torch.float32)):
        np.testing.assert_allclose(found.numpy(), want, rtol=2e-3, atol=4e-4)  # float16 of scale * zero
    np.testing.assert_allclose(
        dequantize(layout.unpack(tensors, k, n, g), torch.float32).numpy(), want, rtol=1e-6, atol=1e-6
    )


def test_gemm_word_of_the_definition() -> None:
    codes = Codes(
        torch.arange(8, dtype=torch.uint8).view(1, 8),
        torch.arange(8, 16, dtype=torch.uint8).view(1, 8),
        torch.ones(1, 8, dtype=torch.float16),
    )
    tensors = checkpoint_layout("gemm").pack(codes)
    assert int(tensors["qweight"]) == 0x75316420
    assert int(tensors["qzeros"]) & 0xFFFFFFFF == 0xFDB9ECA8  # negative as an int32


@pytest.mark.parametrize(
    ("k", "g", "columns"),
    [
        (11008, 128, 88),
        (896, 128, 8),
        (3584, 128, 32),
        (18944, 128, 152),
        (1536, 128, 16),
        (8960, 128, 72),
        (896, 64, 16),
        (896, 32, 32),
        (4096, 4096, 8),
    ],
)
def test_padding_of_real_models(k: int, g: int, columns: int) -> None:
    assert checkpoint_layout("gemv").shapes(k, 64, g)["scales"].shape == (64, columns)
    assert checkpoint_layout("gemv").shapes(k, 64, g)["qzeros"].shape == (64, columns // 8)
    assert checkpoint_layout("gemv_fast").shapes(k, 64, g)["qzeros"].shape == (columns, 64)
    assert checkpoint_layout("llm_awq").shapes(k, 64, g)["scaled_zeros"].shape == (columns, 64)


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_positive_zero(name: str) -> None:
    tensors = checkpoint_layout(name).pack(make(name, 384, 8, 128, zero=0))
    for suffix in tensors.keys() - {"qweight"}:
        tail = tensors[suffix][:, 3:] if name == "gemv" and suffix == "scales" else tensors[suffix][3:]
        if suffix == "qzeros" and name == "gemv":
            tail = tensors[suffix] & ~0xFFF
        assert tail.numel() > 0
        assert not tail.contiguous().view(torch.uint8).any()


def test_scaled_zeros_that_are_no_multiple_of_the_scale_stay_the_truth() -> None:
    layout = checkpoint_layout("gemv_fast")
    tensors = layout.pack(make("gemv_fast", 128, 8, 64))
    tensors["qzeros"][0] += 0.4 * tensors["scales"][0]
    tensors["scales"][1, :4] = 0  # all-zero groups
    tensors["qzeros"][1, :2] = 0
    codes = layout.unpack(tensors, 128, 8, 64)
    assert codes.scaled_zeros is not None
    assert same_bits(codes.scaled_zeros, tensors["qzeros"][:2])
    assert not codes.zeros[1, :4].any()
    again = layout.pack(codes)
    assert all(same_bits(again[suffix], tensors[suffix]) for suffix in tensors)
    # As gemm only the nearest integers are kept: off by at most half a scale.
    gemm = checkpoint_layout("gemm")
    kept = gemm.unpack(gemm.pack(codes), 128, 8, 64)
    off = (dequantize(kept, torch.float32) - dequantize(codes, torch.float32))[:64].abs()
    assert bool((off <= 0.51 * tensors["scales"][0].float()).all())
    assert float(off.max()) > 0


def test_not_a_number_in_scaled_zeros_makes_no_wild_codes() -> None:
    layout = checkpoint_layout("llm_awq")
    tensors = layout.pack(make("llm_awq", 64, 8, 64))
    tensors["scaled_zeros"][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=torch.float16)
    assert layout.unpack(tensors, 64, 8, 64).zeros[0, :3].tolist() == [0, 0, 15]


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_a_symmetric_weight_goes_through_every_layout(source: str, target: str) -> None:
    k, n, g = 256, 64, 128
    first, second = checkpoint_layout(source), checkpoint_layout(target)
    codes = first.unpack(first.pack(make(source, k, n, g, zero=8)), k, n, g)
    moved = second.unpack(second.pack(codes), k, n, g)
    assert torch.equal(dequantize(moved, torch.float32), dequantize(codes, torch.float32))


def test_codes_may_be_strided() -> None:
    for name in NAMES:
        layout, codes = checkpoint_layout(name), make(name, 128, 64, 128)
        strided = Codes(*(t.t().contiguous().t() for t in (codes.codes, codes.zeros, codes.scales)))
        for suffix, tensor in layout.pack(strided).items():
            assert same_bits(tensor, layout.pack(codes)[suffix])
            assert tensor.is_contiguous()


@pytest.mark.parametrize(
    ("name", "problem", "words"),
    [
        ("gemm", (100, 64, 32), "in_features 100 is not a multiple of group_size 32"),
        ("gemm", (64, 63, 32), "out_features 63 is not a multiple of 8"),
        ("gemm", (64, 64, -1), "group_size is -1"),
        ("gemv", (64, 64, 16), "group_size 16 is not 32, 64 or at least 128"),
        ("gemv", (192, 64, 96), "group_size 96 is not"),
        ("gemv", (130, 64, 130), "in_features 130 is not a multiple of 8"),
        ("gemv_fast", (96, 64, 32), "in_features 96 is not a multiple of 64"),
        ("llm_awq", (128, 60, 64), "out_features 60 is not a multiple of 8"),
        ("marlin", (128, 96, 128), "out_features 96 is not a multiple of 64"),
        ("marlin", (24, 64, 8), "in_features 24 is not a multiple of 16"),
    ],
)
def test_refusals(name: str, problem: tuple[int, int, int], words: str) -> None:
    layout = checkpoint_layout(name)
    reason = layout.refuses(*problem)
    assert reason is not None
    assert words in reason
    with pytest.raises(LayoutError, match=name):
        layout.unpack({}, *problem)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_tensors_are_named(name: str) -> None:
    layout = checkpoint_layout(name)
    tensors = layout.pack(make(name, 128, 64, 64))
    assert layout.refuses(128, 64, 64) is None
    for suffix, tensor in tensors.items():
        with pytest.raises(LayoutError, match=f"needs the tensor {suffix}"):
            layout.unpack({s: t for s, t in tensors.items() if s != suffix}, 128, 64, 64)
        with pytest.raises(LayoutError, match=f"wants {suffix} as"):
            layout.unpack(tensors | {suffix: tensor[:-1]}, 128, 64, 64)
        with pytest.raises(LayoutError, match=f"{suffix} as .* got float64"):
            layout.unpack(tensors | {suffix: tensor.double()}, 128, 64, 64)


def test_marlin_refuses_asymmetric_codes_and_bfloat16() -> None:
    layout = checkpoint_layout("marlin")
    codes = make("gemm", 64, 64, 64, zero=7)
    with pytest.raises(LayoutError, match="64 of 64 groups have another zero point"):
        layout.pack(codes)
    with pytest.raises(LayoutError, match="scales as float16"):
        layout.pack(make("marlin", 64, 64, 64, dtype=torch.bfloat16))
    codes.scales.zero_()  # nothing is lost where the scale is 0
    assert not layout.pack(codes)["scales"].any()


def test_unknown_layout_names_those_that_exist() -> None:
    with pytest.raises(LayoutError, match="gemm, gemv, gemv_fast, llm_awq, marlin"):
        checkpoint_layout("exllama")
