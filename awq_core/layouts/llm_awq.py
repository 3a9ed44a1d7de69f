"""``llm_awq``: llm-awq since February 2024 (its v2). The bytes of ``gemv_fast`` under another name for the zeros.

* ``qweight`` int16 [N/4, K]: four rows interleaved in blocks of 64 inputs, see ``interleaved``
* ``scaled_zeros`` [8 * zw, N]: ``-(scale * zero)``, float16, or bfloat16 since February 2025
* ``scales`` [8 * zw, N]: the same dtype

K is a multiple of 64 and g, N of 8, and g is 32, 64 or at least 128.
"""

from __future__ import annotations

from .interleaved import layout

LAYOUT = layout("llm_awq", "scaled_zeros", ("float16", "bfloat16"))
