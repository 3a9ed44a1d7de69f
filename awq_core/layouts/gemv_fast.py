"""``gemv_fast``: AutoAWQ's GEMVFast.

* ``qweight`` int16 [N/4, K]: four rows interleaved in blocks of 64 inputs, see ``interleaved``
* ``qzeros`` [8 * zw, N]: ``-(scale * zero)`` in floating point, float16 from AutoAWQ
* ``scales`` [8 * zw, N]: the same dtype

K is a multiple of 64 and g, N of 8, and g is 32, 64 or at least 128.
"""

from __future__ import annotations

from .base import SCALE_DTYPES
from .interleaved import layout

LAYOUT = layout("gemv_fast", "qzeros", SCALE_DTYPES)
