"""Sizes of the GEMV's tiles, as measured on an H100 (README.md)."""

COLUMNS = 32  # of the weight in a program: one warp reads 128 bytes of a row
BLOCKS = 2  # of 128 k in a step
WARPS = 4
FILL = 768  # programs that splitting K aims at


def split_for(in_features: int, out_features: int) -> int:
    """Into how many parts (a power of 2, at most 8) K is split, so that few columns still fill the device."""
    tiles = -(-out_features // COLUMNS)
    steps = -(-in_features // (128 * BLOCKS))
    split = 1
    while split < 8 and tiles * split < FILL and split * 2 <= steps:
        split *= 2
    return split
