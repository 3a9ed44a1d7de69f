"""``awq backends``: what the plugins of this environment offer, and what of it works here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._options import AsJson

if TYPE_CHECKING:
    from ..capability import Capability
    from ..kernel import Backend
    from ..plugins import Registry
    from ..spec import Device


def backends(as_json: AsJson = False) -> None:
    """List the kernel backends: where each comes from, whether it runs here, what its kernels declare.

    The fusing mappings, for do_fuse=True, stand below; a plugin that could not be loaded is listed with the reason.
    """
    from .. import plugins
    from ._device import local_devices
    from ._output import console, print_json, table

    found = plugins.registry()
    devices = local_devices()
    here = {
        (name, device): availability(backend, device) for name, backend in found.backends.items() for device in devices
    }
    if as_json:
        print_json(
            {
                "devices": [str(device) for device in devices],
                "backends": [
                    {
                        "name": name,
                        "distribution": found.sources[name].distribution,
                        "version": found.sources[name].version,
                        "here": {str(device): here[name, device] or "available" for device in devices},
                        "kernels": [
                            {"name": k.name, "reads": k.reads, "declares": [declared(c) for c in k.capabilities]}
                            for k in backend.kernels
                        ],
                    }
                    for name, backend in found.backends.items()
                ],
                "fusing": fusing(found),
                "failures": [
                    {
                        "name": f.source.name,
                        "distribution": f.source.distribution,
                        "version": f.source.version,
                        "error": f.error,
                    }
                    for f in found.failures
                ],
            }
        )
        return
    out = console()
    out.print(
        table(
            "Backends",
            "backend | from | " + " | ".join(f"on {device}" for device in devices),
            [
                (
                    name,
                    f"{found.sources[name].distribution} {found.sources[name].version}",
                    *(here[name, device] or "available" for device in devices),
                )
                for name in found.backends
            ],
        )
    )
    out.print(
        table(
            "What their kernels declare",
            "kernel | device | dtypes | layouts | group_size | M | in memory as | >priority",
            [
                (
                    f"{name}.{kernel.name}",
                    *row(record),
                    "as stored" if kernel.reads == "*" else kernel.reads,
                    record.priority,
                )
                for name, backend in found.backends.items()
                for kernel in backend.kernels
                for record in sorted(kernel.capabilities, key=lambda c: (c.rows.first, -c.priority))
            ],
        )
    )
    if found.fusers:
        out.print(
            table(
                "Fusing mappings (do_fuse=True)",
                "from | model types | attention | MLP",
                [
                    (
                        f"{mapping['distribution']} {mapping['version']}",
                        *(", ".join(mapping[key]) or "-" for key in ("model_types", "attention", "mlp")),
                    )
                    for mapping in fusing(found)
                ],
            )
        )
    if found.failures:
        out.print(table("Could not be loaded", "plugin | why", [(str(f.source), f.error) for f in found.failures]))


def fusing(found: Registry) -> list[dict[str, Any]]:
    """The fusing mappings as plain data."""
    sources = [found.sources[f"model type:{mapping.model_types[0]}"] for mapping in found.fusers]
    return [
        {
            "distribution": source.distribution,
            "version": source.version,
            "model_types": list(mapping.model_types),
            "layers": mapping.layers,
            "attention": list(mapping.attention),
            "mlp": list(mapping.mlp),
        }
        for source, mapping in zip(sources, found.fusers, strict=True)
    ]


def availability(backend: Backend, device: Device) -> str | None:
    """Why ``backend`` does nothing on this device of this machine (None: it is available)."""
    from .. import plugins

    records = [record for kernel in backend.kernels for record in kernel.capabilities]
    if not any(_covers(record, device) for record in records):
        return f"declares nothing for {device}"
    return plugins.probe(backend, device)


def _covers(record: Capability, device: Device) -> bool:
    return (
        record.device in ("*", device.type)
        and (not record.vendors or device.vendor in record.vendors)
        and (not record.archs or device.arch in record.archs)
    )


def row(record: Capability) -> tuple[str, ...]:
    """Device, dtypes, layouts, group sizes and M of a record in words."""
    from ..capability import groups_text

    device = "any" if record.device == "*" else record.device
    narrowed = [*sorted(record.vendors), *sorted(record.archs)]
    return (
        f"{device}: {', '.join(narrowed)}" if narrowed else device,
        ", ".join(sorted(record.dtypes)) or "any",
        ", ".join(sorted(record.layouts)) or "any",
        groups_text(record),
        str(record.rows),
    )


def declared(record: Capability) -> dict[str, Any]:
    """A record as plain data; an empty list sets no limit."""
    return {
        "device": record.device,
        "vendors": sorted(record.vendors),
        "archs": sorted(record.archs),
        "dtypes": sorted(record.dtypes),
        "layouts": sorted(record.layouts),
        "group_sizes": sorted(record.group_sizes),
        "group_multiple": record.group_multiple,
        "in_multiple": record.in_multiple,
        "out_multiple": record.out_multiple,
        "rows": [record.rows.first, record.rows.last],
        "zero_points": sorted(record.zero_points),
        "compile_safe": record.compile_safe,
        "tested": sorted(record.tested),
        "priority": record.priority,
    }
