"""The decode step's Triton functions with typical types and constants, to be compiled for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Iterator

from awq_core.api import TritonSource

from . import kernels

HEADS = ((128, 4, 0.0), (256, 8, 50.0), (96, 1, 0.0))  # head_dim, query heads of a key head, soft cap


def sources(dtypes: tuple[str, ...] = ("fp16", "bf16"), overlap: bool = True) -> Iterator[TritonSource]:
    """One source for each kernel and form of it; ``overlap``: as they are launched from sm90 on."""
    for name in dtypes:
        yield from _of(f"*{name}:16", overlap)


def _of(x: str, overlap: bool) -> Iterator[TritonSource]:
    i32, i64, f32 = "*i32:16", "*i64:16", "*fp32:16"
    rows = dict.fromkeys(("y_ptr", "x_ptr", "after_ptr", "w_ptr", "out_ptr"), x)
    norm = {
        "H": 4096,
        "BLOCK": 4096,
        "EPS": 1e-5,
        "AFTER_EPS": 1e-5,
        "OFFSET": True,
        "ADD": True,
        "AFTER": True,
        "OVERLAP": overlap,
    }
    yield TritonSource(kernels.add_norm, rows, norm, {"num_warps": 8})
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield TritonSource(
            kernels.gated, {"x_ptr": x, "out_ptr": x, "size": "i32"}, {"BLOCK": 512, "KIND": kind, "OVERLAP": overlap}
        )
    names = ("qkv_ptr", "cache_ptr", "cos_ptr", "sin_ptr", "q_w_ptr", "k_w_ptr")
    taken = dict.fromkeys(names, x) | {"pads_ptr": i32, "S": "i32"}
    for size, group, softcap in HEADS:
        padded = 1 << (size - 1).bit_length()
        head = {"HK": 8, "D": size, "DP": padded, "R": size, "NORM": softcap > 0, "OFFSET": softcap > 0, "EPS": 1e-6}
        more = {"SCALING": 0.1, "SOFTCAP": softcap, "WINDOW": 4096 if softcap else 0, "G": group, "GP": 16}
        more |= {"SPLITS": 16, "BLOCK": 128 if size <= 128 else 32, "OVERLAP": overlap, "WIDE": False}
        places = {"out_ptr": x, "length_ptr": i32, "parts_ptr": f32, "tops_ptr": f32, "counters_ptr": i32}
        yield TritonSource(kernels.attend, taken | places, head | more, {"num_warps": 8, "num_stages": 2})
        more = {"HQ": 8 * group}
        yield TritonSource(kernels.turn_and_keep, taken | {"q_ptr": x, "T": "i32"}, head | more, {"num_warps": 1})
    choice = {"logits_ptr": x, "best_ptr": f32, "V": "i32", "S1": "i32", "B": "i32"}
    choice |= dict.fromkeys(("tokens_ptr", "ids_ptr", "eos_ptr", "pad_ptr"), i64)
    choice |= dict.fromkeys(("open_ptr", "left_ptr", "length_ptr", "where_ptr", "counters_ptr"), i32)
    yield TritonSource(
        kernels.pick, choice, {"BLOCKS": 16, "BLOCKS_P": 16, "SIZE": 2048, "E": 8, "OVERLAP": overlap}, {"num_warps": 8}
    )
