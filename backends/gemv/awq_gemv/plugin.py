"""What the GEMV backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from awq_core.api import Backend, Capability, Device, Kernel, LinearSpec, Reason, Rows, TritonSource, hookimpl, lazy
from awq_core.fragments import chunk

PLUGIN_API = 1

LAYOUTS = frozenset({"gemm", "gemv", "marlin"})  # those with integer zero points
ONE_FORMS = ("silu_mul", "add", "norm", "norm_silu_mul")
NVIDIA = frozenset({"sm80", "sm86", "sm89", "sm90", "sm100", "sm120"})


def _probe(device: Device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


def _record(rows: Rows, priority: int, archs: frozenset[str] = NVIDIA, group_multiple: int = 16) -> Capability:
    return Capability(
        device="cuda",
        vendors=frozenset({"nvidia"}),
        archs=archs,
        layouts=LAYOUTS,
        dtypes=frozenset({"float16", "bfloat16"}),
        group_multiple=group_multiple,
        out_multiple=8,
        rows=rows,
        priority=priority,
        tested=frozenset({"sm90"}),
    )


def _sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .tiles import AHEAD, REGISTERS, STAGES, WARPS

    kind = {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[spec.dtype]
    signature = {"x_ptr": kind, "words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": "*i32:16"}
    signature |= dict.fromkeys(("y_ptr", "bias_ptr", "other_ptr"), kind)
    signature |= {"parts_ptr": "*fp32:16", "counters_ptr": "*i32:16", "K": "i32", "N": "i32", "M": "i32", "G": "i32"}
    constants = {
        "GP": spec.group_size // 16,
        "CH": chunk(spec.group_size),
        "STAGES": STAGES,
        "EVEN": spec.in_features % 128 == 0,
    }
    constants |= {"FULL": True, "JOIN": spec.device.arch == "sm90", "PTX": True, "WIDE": False}
    constants["THREADS"] = 32 * WARPS
    constants["AHEAD"] = AHEAD if spec.device.arch in ("sm90", "sm100", "sm120") else 0
    plain, forms = {"BIAS": False, "SILU": False, "ADD": False}, ("", "BIAS", "SILU", "ADD")
    ways = [(columns, mt, form) for columns, mt in ((128, 8), (128, 16), (64, 16)) for form in forms]
    return [
        TritonSource(
            kernels.few,
            signature,
            constants | plain | ({form: True} if form else {}) | {"NT": columns, "MT": mt, "SPLIT": 4},
            {"num_warps": WARPS, "maxnreg": REGISTERS},
        )
        for columns, mt, form in ways
    ]


def _one_refuses(spec: LinearSpec) -> Reason | None:
    from .tiles import MOST_IN

    if spec.in_features > MOST_IN:
        return Reason("in_features", f"at most {MOST_IN}, whose row fits into shared memory", str(spec.in_features))
    return None


def _one_sources(spec: LinearSpec) -> Sequence[TritonSource]:
    if spec.device.arch != "sm90" or spec.group_size % 128 or spec.in_features % 128:
        return []
    from . import one
    from .tiles import BLOCKS, MOST_NORMED, WARPS, steps_for, way_for

    kind = {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[spec.dtype]
    signature = {"words_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": "*i32:16", "K": "i32", "N": "i32"}
    rows = ("x_ptr", "plus_ptr", "norm_ptr", "stream_ptr", "y_ptr", "bias_ptr", "other_ptr")
    signature |= dict.fromkeys(rows, kind)
    constants: dict[str, object] = {
        "EPS": 1e-6,
        "OFFSET": False,
        "GP": spec.group_size // 16,
        "B": BLOCKS,
        "STEPS": steps_for(spec.in_features),
    }
    constants["D"] = way_for(spec.in_features, spec.out_features).depth
    plain = dict.fromkeys(("NORM", "PLUS", "BIAS", "SILU", "ADD"), False)
    forms: list[tuple[str, ...]] = [(), ("BIAS",), ("SILU",), ("ADD",)]
    if spec.in_features <= MOST_NORMED:
        forms += [("NORM", "PLUS", "BIAS"), ("NORM", "PLUS", "SILU"), ("NORM",)]
    return [
        TritonSource(
            one.one,
            signature,
            constants | plain | dict.fromkeys(form, True),
            {"num_warps": WARPS},
        )
        for form in forms
    ]


BACKEND = Backend(
    name="gemv",
    kernels=(
        Kernel(
            name="one",
            reads="awq_fragments",
            capabilities=(_record(Rows(1, 1), 250, frozenset({"sm90"}), 128),),
            apply=lazy("awq_gemv.launch:one"),
            refuses=_one_refuses,
            sources=_one_sources,
            adds_bias=True,
            epilogues={name: lazy(f"awq_gemv.launch:one_{name}") for name in ONE_FORMS},
        ),
        Kernel(
            name="few",
            reads="awq_fragments",  # offered by the GEMM backend, so that decoding and prefill share one copy
            capabilities=(_record(Rows(1, 16), 230),),
            apply=lazy("awq_gemv.launch:few"),
            sources=_sources,
            tunables=lazy("awq_gemv.tiles:candidates"),
            adds_bias=True,
            epilogues={name: lazy(f"awq_gemv.launch:{name}") for name in ("silu_mul", "add")},
        ),
    ),
    probe=_probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``gemv``."""
    return (BACKEND,)
