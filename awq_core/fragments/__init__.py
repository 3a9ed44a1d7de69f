"""``awq_fragments``: the resident layout that the GPU backends share, so that decoding and prefill read one copy.

The words lie in the order of a tensor core's left operand: one 16-byte load puts the codes of a thread into its own
registers, where they are unpacked and multiplied without a trip through shared memory. This needs the transposed
product, ``y^T = w^T x^T``, in which the weight is the left operand.

* ``words`` int32 [ceil(N/16), ceil(K/128), 256]: 16 columns by 128 k. Word ``128 * c + 4 * lane + 2 * h + p``
  belongs to column ``lane // 4 + 8 * h`` and holds the codes of ``k = 16 * j + 8 * c + 2 * (lane % 4) + i`` for the
  planes j = 4 * p + q, q = 0..3, and i = 0, 1, at nibble ``q + 4 * i``: two neighbouring k lie 16 bits apart, so
  that one ``lop3`` makes a pair of 16-bit floats of them. What lies past K or N is zero.
* ``zeros`` int32 [K/g, ceil(N/8)]: zero points, eight columns to a word, the first in the lowest nibble.
* ``scales`` [K/g, N] as stored.

With experts each tensor has a leading dimension E. ``layout`` packs and unpacks it with torch, ``kernels`` holds the
Triton functions that read it, ``launch`` what their callers share. A third party's kernels may read it too.
"""

from __future__ import annotations


def chunk(group_size: int) -> int:
    """How many planes of 16 k, from one that starts a chunk, a kernel sums before it scales: all in one group."""
    planes = group_size // 16
    if planes % 8 == 0:
        return 8
    return planes if 8 % planes == 0 else 1
