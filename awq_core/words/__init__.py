"""``awq_words``: the weight as ExLlama-v2 keeps it, shuffled once at load; GPUs of NVIDIA and AMD read it alike.

* ``words`` int32 [K/8, N]: word w of a column holds the codes of ``k = 8w .. 8w + 7``, in the nibbles 0, 4, 1, 5, 2, 6,
  3, 7: the even k in the low half, the odd ones in the high half. So one mask over the whole word gives two neighbours,
  each in its own half, where the bits of 1024 or 64 make a float16 of it; seven shifts become one.
* ``zeros`` [K/g, N]: uint8, or as stored where the checkpoint keeps ``-(scale * zero)`` (``SCALED``)
* ``scales`` [K/g, N] as stored

Zero points stand as they are: ExLlama's own format stores them less one, in 4 bits, which goes wrong at 0.

With experts each tensor has a leading dimension E. ``layout`` packs and unpacks it with torch, ``kernels`` holds the
Triton functions that read it, ``launch`` runs them, ``tiles`` says what their tiles have in common, and ``sources``
how they are compiled. What a backend adds is its records, its choice of tiles and the order in which it deals them out.
A third party's kernels may read it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..spec import Device, LinearSpec

AWQ_WORDS = "awq_words"
SCALED = frozenset({"gemv_fast", "llm_awq"})  # these store zero points as -(scale * zero), in floating point
LAYOUTS = SCALED | {"gemm", "gemv", "marlin"}  # what it can be made of


def nbytes(spec: LinearSpec) -> int:
    """Bytes of the resident tensors, with scales (and zeros that are scaled) of 16 bits."""
    words = spec.in_features // 8 * spec.out_features
    each = 4 if spec.layout in SCALED else 3
    return (4 * words + each * spec.groups * spec.out_features) * max(1, spec.experts)


def probe(device: Device) -> str | None:
    """Why no kernel on it can run here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None
