"""Which layout the bytes of a module lie in, from names, dtypes and shapes in the file's header; no tensor is read.

The ``version`` of a config is never asked: it is only compared afterwards (``reconcile_version``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..errors import LayoutError
from . import checkpoint_layout

FLOATS = ("float16", "bfloat16", "float32")
PARTS = ("qweight", "qzeros", "scaled_zeros", "scales", "bias")
OTHER_BITS = (2, 3, 8)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """What a file's header says of one tensor. ``dtype`` is torch's name (``"int32"``), ``file`` its path."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class ModuleHeader:
    """The tensors of one module by suffix: ``qweight``, ``qzeros``, ``scales``, ``bias``, ..."""

    name: str
    tensors: Mapping[str, TensorHeader]

    @property
    def file(self) -> str:
        """The file of the qweight (or of any tensor where there is none)."""
        header = self.tensors.get("qweight") or next(iter(self.tensors.values()), None)
        return header.file if header is not None else "no file"

    def __str__(self) -> str:
        return ", ".join(f"{suffix} {header}" for suffix, header in self.tensors.items() if suffix in (*PARTS, "g_idx"))


@dataclass(frozen=True, slots=True)
class Detected:
    """What one quantized module is. ``group_size`` is resolved; ``notes`` are sentences to tell the user."""

    layout: str
    in_features: int
    out_features: int
    group_size: int
    bias: bool
    notes: tuple[str, ...] = ()


def detect(module: ModuleHeader, group_size: int | None = None, in_out: tuple[int, int] | None = None) -> Detected:
    """The layout and sizes of ``module``.

    ``group_size`` is what the config claims (-1 is K, None: no claim). gemm and marlin show g in their shapes, and the
    header wins; the gemv family is padded, so there the claim decides as long as it fits the shapes, and else the one
    group size that fits. ``in_out`` is (K, N) of the module in the model, where that is known.

    Raises:
        LayoutError: nothing fits, or more than one group size does.
    """
    fits = [
        (layout, k, n, g)
        for layout in candidates(module)
        for k, n in _features(layout, module.tensors["qweight"].shape)
        for g in _group_sizes(layout, module, k)
        if _matches(module, layout, k, n, g)
    ]
    if not fits:
        raise LayoutError(_unresolved(module, group_size, in_out))
    claimed = [fit for fit in fits if group_size is not None and fit[3] == (fit[1] if group_size == -1 else group_size)]
    chosen = claimed or fits
    if len(chosen) > 1:
        found = ", ".join(str(fit[3]) for fit in chosen)
        said = "gives none" if group_size is None else f"says {group_size}, which does not fit"
        raise LayoutError(
            f"{module.file}: {module.name} is {chosen[0][0]} with {module}, which fits the group sizes {found}, "
            f"and the config {said}: set group_size in the quantization_config"
        )
    layout, k, n, g = chosen[0]
    if in_out is not None and (k, n) != in_out:
        raise LayoutError(
            f"{module.file}: {module.name} is {layout} with in_features {k} and out_features {n} ({module}), but the "
            f"model wants in_features {in_out[0]} and out_features {in_out[1]}: "
            f"{_wanted(layout, *in_out, g)}{_guess(module, in_out)}"
        )
    bias = module.tensors.get("bias")
    if bias is not None and bias.shape != (n,):
        raise LayoutError(f"{bias.file}: {module.name}.bias is {bias}, but {layout} with N={n} wants [{n}]")
    notes: tuple[str, ...] = ()
    if group_size is not None and not claimed:
        notes = (f"the config says group_size {group_size}, but the tensors have {g}: {g} is used",)
    return Detected(layout, k, n, g, bias is not None, notes)


def candidates(module: ModuleHeader) -> tuple[str, ...]:
    """The layouts that names and dtypes admit, shapes left aside."""
    tensors = module.tensors
    weight, zeros = tensors.get("qweight"), tensors.get("qzeros")
    if weight is None or "scales" not in tensors or "g_idx" in tensors:
        return ()
    if "scaled_zeros" in tensors:
        return ("llm_awq",) if weight.dtype == "int16" and zeros is None else ()
    if zeros is None:
        return ("marlin",) if weight.dtype == "int32" else ()
    if weight.dtype == "int16":
        return ("gemv_fast",) if zeros.dtype in FLOATS else ()
    return ("gemm", "gemv") if weight.dtype == zeros.dtype == "int32" else ()


def _features(layout: str, weight: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(K, N) that a qweight of this shape has in ``layout``: one, or none where it cannot be."""
    if len(weight) != 2:
        return
    rows, columns = weight
    match layout:
        case "gemm":
            yield rows, columns * 8
        case "gemv":
            yield columns * 8, rows
        case "marlin":
            yield rows * 16, columns // 2
        case "gemv_fast" | "llm_awq":
            yield columns, rows * 4


def _group_sizes(layout: str, module: ModuleHeader, k: int) -> Iterator[int]:
    """The group sizes to try: the one in the shapes, or for a padded layout all that a config may say."""
    scales = module.tensors["scales"].shape if "scales" in module.tensors else ()
    if layout in ("gemm", "marlin"):
        if scales and scales[0] and k % scales[0] == 0:
            yield k // scales[0]
    elif len(scales) == 2:
        padded = scales[1 if layout == "gemv" else 0]
        # At most 31 groups of padding (g=32: four words of eight); _matches checks which counts give this width.
        yield from (k // groups for groups in range(padded, max(padded - 32, 0), -1) if k % groups == 0)


def _matches(module: ModuleHeader, layout: str, k: int, n: int, g: int) -> bool:
    """Whether all tensors have the shapes and dtypes of a K x N weight with this g."""
    found = checkpoint_layout(layout)
    if found.refuses(k, n, g) is not None:
        return False
    tensors = module.tensors
    return all(
        suffix in tensors and tensors[suffix].shape == spec.shape and tensors[suffix].dtype in spec.dtypes
        for suffix, spec in found.shapes(k, n, g).items()
    )


def _unresolved(module: ModuleHeader, group_size: int | None, in_out: tuple[int, int] | None) -> str:
    """The sentence for a module that fits nothing: shapes found, those of the nearest layouts, a guess at the cause."""
    tensors = module.tensors
    wanted: list[str] = []
    for layout in candidates(module) or _nearest(module):
        sizes = [in_out] if in_out is not None else list(_features(layout, tensors["qweight"].shape))
        for k, n in sizes:
            shown = next(_group_sizes(layout, module, k), None) if layout in ("gemm", "marlin") else None
            g = k if group_size == -1 else shown or group_size or 128
            wanted.append(_wanted(layout, k, n, g))
    return (
        f"{module.file}: {module.name} lies in no AWQ layout that awq-core knows: found {module}; "
        f"{'; '.join(wanted) or 'AWQ wants a qweight [rows, columns] and scales'}{_guess(module, in_out)}"
    )


def _nearest(module: ModuleHeader) -> tuple[str, ...]:
    """What to compare with where names and dtypes admit nothing."""
    weight = module.tensors.get("qweight")
    if weight is None:
        return ()
    if weight.dtype == "int16":
        return ("llm_awq",) if "scaled_zeros" in module.tensors else ("gemv_fast",)
    return ("gemm",)


def _wanted(layout: str, k: int, n: int, g: int) -> str:
    """What ``layout`` wants of this problem, in words."""
    found = checkpoint_layout(layout)
    if (reason := found.refuses(k, n, g)) is not None:
        return f"{layout} would need K={k} N={n} g={g}, but {reason}"
    specs = ", ".join(f"{name} {' or '.join(s.dtypes)} {list(s.shape)}" for name, s in found.shapes(k, n, g).items())
    return f"{layout} with K={k} N={n} g={g} wants {specs}"


def _guess(module: ModuleHeader, in_out: tuple[int, int] | None) -> str:
    """What the tensors look like instead, if anything."""
    weight, zeros, scales = (module.tensors.get(suffix) for suffix in ("qweight", "qzeros", "scales"))
    if "g_idx" in module.tensors:
        return "; g_idx shows that it is a GPTQ checkpoint: load it with a GPTQ library"
    if weight is None or scales is None or len(weight.shape) != 2 or len(scales.shape) != 2 or weight.dtype != "int32":
        return ""
    rows, columns = weight.shape
    if columns == scales.shape[1] and zeros is not None and zeros.shape == (scales.shape[0], columns // 8):
        return "; it looks like GPTQ (packed along K): load it with a GPTQ library"
    for bits in OTHER_BITS:
        along_n = columns * 32 == scales.shape[1] * bits and (in_out is None or rows == in_out[0])
        along_k = in_out is not None and rows == in_out[1] and columns * 32 == in_out[0] * bits
        if along_n or along_k:
            return f"; the shapes fit {bits} bits, and awq-core reads 4 bits only"
    return ""


_CLAIMS = {
    "gemm": "gemm",
    "gemv": "gemv",
    "gemv-fast": "gemv_fast",
    "llm-awq": "llm_awq",
    "marlin": "marlin",
    # Names of run-time kernels that may have been saved; what lies on disk under them is gemm.
    "exllama": "gemm",
    "ipex": "gemm",
}


def reconcile_version(claimed_version: str | None, backend: str | None, detected_layout: str) -> str | None:
    """The sentence for the user if the config's ``version`` or ``backend`` names another layout than the header shows.

    None if they agree or claim nothing. ``backend: "llm-awq"`` claims ``llm_awq``: llm-awq writes ``version: "gemv"``
    beside it whatever the bytes are, so either of the two may be right.
    """
    version = None if claimed_version is None else _CLAIMS.get(_spelled(claimed_version), "unknown")
    maker = "llm_awq" if backend is not None and _spelled(backend) == "llm-awq" else None
    claims = {claim for claim in (version, maker) if claim is not None}
    if not claims or detected_layout in claims:
        return None
    said = [f"version {claimed_version!r}"] if version is not None else []
    said += [f"backend {backend!r}"] if maker is not None else []
    return (
        f"the quantization_config says {' and '.join(said)}, but the tensors lie in the {detected_layout} layout: "
        f"{detected_layout} is used"
    )


def _spelled(name: str) -> str:
    return name.strip().lower().replace("_", "-")
