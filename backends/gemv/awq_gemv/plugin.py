"""What the GEMV backend declares. Importing this imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from awq_core.api import Backend, Capability, Device, Kernel, LinearSpec, Rows, TritonSource, hookimpl, lazy

PLUGIN_API = 1

LAYOUTS = frozenset({"gemm", "gemv", "marlin"})  # those with integer zero points
NVIDIA = frozenset({"sm80", "sm86", "sm89", "sm90", "sm100", "sm120"})


def _probe(device: Device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


def _record(rows: Rows, priority: int) -> Capability:
    return Capability(
        device="cuda",
        vendors=frozenset({"nvidia"}),
        archs=NVIDIA,
        layouts=LAYOUTS,
        dtypes=frozenset({"float16", "bfloat16"}),
        group_multiple=16,
        out_multiple=8,
        rows=rows,
        priority=priority,
        tested=frozenset({"sm90"}),
    )


def _sources(spec: LinearSpec) -> Sequence[TritonSource]:
    from . import kernels
    from .tiles import BLOCKS, COLUMNS, WARPS

    x = {"float16": "*fp16:16", "bfloat16": "*bf16:16"}[spec.dtype]
    signature = {"x_ptr": x, "planes_ptr": "*i32:16", "scales_ptr": "*fp16:16", "zeros_ptr": "*u8:16", "y_ptr": x}
    signature |= {"parts_ptr": "*fp32:16", "counters_ptr": "*i32:16", "K": "i32", "N": "i32", "G": "i32"}
    constants = {"GP": spec.group_size // 16, "NT": COLUMNS, "BLOCKS": BLOCKS, "SPLIT": 4, "EVEN": True}
    constants["PTX"] = spec.device.vendor == "nvidia"
    return [TritonSource(kernels.gemv, signature, constants, {"num_warps": WARPS})]


BACKEND = Backend(
    name="gemv",
    kernels=(
        Kernel(
            name="row",
            reads="awq_planes",  # offered by the GEMM backend, so that decoding and prefill share one copy
            capabilities=(_record(Rows(1, 1), 230), _record(Rows(2, 8), 150)),
            apply=lazy("awq_gemv.launch:gemv"),
            sources=_sources,
        ),
    ),
    probe=_probe,
)


@hookimpl
def awq_core_backends() -> Iterable[Backend]:
    """The backend ``gemv``."""
    return (BACKEND,)
