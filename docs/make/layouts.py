"""A picture of each layout: which code lies in which nibble, found by packing and not by hand."""

from __future__ import annotations

import torch
from svg import COLOURS, SOFT, Picture

from awq_core.layouts import NAMES, checkpoint_layout
from awq_core.layouts.base import Codes
from awq_core.layouts.nibbles import split

K, N, G = 128, 64, 128
CELL, ROW = 92, 30
# The words that show the pattern: (row, column) of qweight.
SHOWN = {
    "gemm": [(0, 0), (0, 1), (1, 0)],
    "gemv": [(0, 0), (0, 1), (1, 0)],
    "gemv_fast": [(0, 0), (0, 1), (0, 8), (0, 16), (0, 64), (1, 0)],
    "llm_awq": [(0, 0), (0, 1), (0, 8), (0, 16), (0, 64), (1, 0)],
    "marlin": [(0, 0), (0, 1), (0, 4), (0, 16), (0, 32), (1, 0)],
}


def places(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K index and N index of each nibble of qweight, [rows, words, nibbles of a word], lowest nibble first."""
    k = torch.arange(K)[:, None].expand(K, N)
    n = torch.arange(N)[None, :].expand(K, N)

    def packed(values: torch.Tensor) -> torch.Tensor:
        """The nibbles of the stored words when each code is the value's lowest four bits."""
        codes = Codes(
            (values & 15).to(torch.uint8).contiguous(),
            torch.full((K // G, N), 8, dtype=torch.uint8),
            torch.ones(K // G, N, dtype=torch.float16),
        )
        words = checkpoint_layout(layout).pack(codes)["qweight"]
        return split(words).view(*words.shape, -1).to(torch.int64)

    return packed(k) + 16 * packed(k >> 4), packed(n) + 16 * packed(n >> 4)


def picture(layout: str) -> str:
    """The first words of ``layout``, each nibble with the weight that it holds."""
    k, n = places(layout)
    per_word = k.shape[-1]
    shapes = checkpoint_layout(layout).shapes(K, N, G)
    left, top = 130, 66
    shown = SHOWN[layout]
    made = Picture(left + per_word * CELL + 20, top + len(shown) * (ROW + 8) + 30, f"Nibbles of layout {layout}")
    made.text(16, 26, f"{layout}: qweight {shapes['qweight'].dtypes[0]} of a weight with K={K}, N={N}", 15, bold=True)
    for i in range(per_word):
        made.text(left + (per_word - 1 - i) * CELL + CELL / 2, top - 12, f"nibble {i}", 11, SOFT, "middle")
    for line, (row, word) in enumerate(shown):
        y = top + line * (ROW + 8)
        made.text(left - 12, y + 20, f"word [{row}, {word}]", 12, SOFT, "end")
        for i in range(per_word):
            at_k, at_n = int(k[row, word, i]), int(n[row, word, i])
            x = left + (per_word - 1 - i) * CELL
            colour = COLOURS[(at_n if layout in ("gemm", "marlin") else at_k // (8 if per_word == 4 else 1)) % 8]
            made.box(x, y, CELL - 3, ROW, colour)
            made.text(x + CELL / 2 - 1, y + 20, f"k {at_k} n {at_n}", 12, anchor="middle")
    made.text(left, made.height - 14, "lowest nibble on the right, as numbers are written", 11, SOFT)
    return str(made)


def pictures() -> dict[str, str]:
    """File name to SVG."""
    return {f"layout-{name}.svg": picture(name) for name in NAMES}
