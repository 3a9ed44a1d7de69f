"""``awq inspect``: what a checkpoint holds, what it takes on disk and in memory, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from ._options import AsJson, CheckpointPath

if TYPE_CHECKING:
    from ._checkpoint import Opened
    from ._plans import Planned


def inspect(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: layouts, shapes, group sizes, sizes on disk and in memory, and what is odd.

    Only the headers of the files are read. The layout is what the headers show, whatever the config says.
    """
    from ._checkpoint import linears, open_checkpoint, taken_dtype
    from ._device import wanted_device
    from ._output import console, print_json, size, table
    from ._plans import plan_all, requested

    opened = open_checkpoint(path)
    device, _ = wanted_device(None)
    dtype = taken_dtype(opened, device)
    planned = plan_all(linears(opened, dtype, device), requested(None))
    found = facts(opened, planned) | {"device": str(device), "dtype": dtype, "odd": oddities(opened)}
    if as_json:
        print_json(found)
        return
    out = console()
    out.print(f"{path}: {found['architecture']}, {found['modules']} quantized modules\n")
    disk, memory = found["disk_bytes"], found["memory_bytes"]
    out.print(
        table(
            "Size",
            "| >on disk | >in memory",
            [
                ("quantized", size(disk["quantized"]), size(memory["quantized"])),
                ("dense", size(disk["dense"]), size(memory["dense"])),
                (f"all ({found['files']} files; {dtype} on {device})", size(disk["files"]), size(memory["all"])),
            ],
        )
    )
    columns = ">count | >K | >N | >g | layout | bias | in memory as | >on disk, each | >in memory, each"
    keys = ("count", "in_features", "out_features", "group_size", "layout", "bias", "resident")
    lines = [
        (*(line[key] for key in keys), size(line["disk_bytes"]), size(line["memory_bytes"]))
        for line in found["linears"]
    ]
    out.print(table("Quantized linears", columns, lines))
    dense = [(d["count"], d["shape"], d["dtype"], size(d["bytes"]), d["example"]) for d in found["dense"]]
    out.print(table("Dense tensors", ">count | shape | dtype | >on disk, all | for example", dense))
    out.print(table("Config", "key | value", found["config"].items()))
    if found["odd"]:
        out.print("Odd", style="bold")
        for sentence in found["odd"]:
            out.print(f"* {sentence}", soft_wrap=True)


def facts(opened: Opened, planned: list[Planned]) -> dict[str, Any]:
    """Counts and sizes (bytes) as plain data."""
    from ..resident import checkpoint_bytes
    from ._checkpoint import tensor_bytes

    dense = opened.dense
    dense_memory = sum(tensor_bytes(header, planned[0].plan.spec.dtype) for header in dense.values())
    dense_disk = sum(map(tensor_bytes, dense.values()))
    sizes = [(item.count, item.resident_bytes) for item in planned]
    quantized_memory = sum(count * (nbytes or 0) for count, nbytes in sizes)
    groups = Counter((header.shape, header.dtype) for header in dense.values())
    return {
        "path": str(opened.folder),
        "architecture": ", ".join(opened.model.get("architectures") or []) or opened.model.get("model_type", "unknown"),
        "files": len(opened.files),
        "modules": len(opened.modules),
        "layouts": Counter(found.layout for found in opened.modules.values()),
        "group_sizes": Counter(found.group_size for found in opened.modules.values()),
        "disk_bytes": {
            "files": sum(file.stat().st_size for file in opened.files),
            "quantized": sum(map(tensor_bytes, opened.headers.values())) - dense_disk,
            "dense": dense_disk,
        },
        "memory_bytes": {
            "quantized": quantized_memory,
            "dense": dense_memory,
            "all": quantized_memory + dense_memory,
        },
        "linears": [
            {
                "count": item.count,
                "in_features": spec.in_features,
                "out_features": spec.out_features,
                "group_size": spec.group_size,
                "layout": spec.layout,
                "bias": spec.bias,
                "experts": spec.experts,
                "resident": item.plan.resident.name,
                "disk_bytes": checkpoint_bytes(spec),
                "memory_bytes": item.resident_bytes,
            }
            for item in planned
            for spec in [item.plan.spec]
        ],
        "dense": [
            {
                "count": count,
                "shape": list(shape),
                "dtype": dtype,
                "bytes": sum(tensor_bytes(h) for h in dense.values() if (h.shape, h.dtype) == (shape, dtype)),
                "example": next(name for name, h in dense.items() if (h.shape, h.dtype) == (shape, dtype)),
            }
            for (shape, dtype), count in groups.items()
        ],
        "config": opened.config.to_dict(),
    }


def oddities(opened: Opened) -> list[str]:
    """What the user may want to know, a sentence each."""
    from ..layouts.detect import reconcile_version

    config, modules = opened.config, opened.modules
    told: Counter[str] = Counter()
    for found in modules.values():
        said = reconcile_version(config.version, config.backend, found.layout)
        told.update([*([said] if said else []), *found.notes])
    odd = [text if count == len(modules) else f"{text} ({count} modules)" for text, count in told.items()]
    odd += config.notes
    for kind, values in (
        ("layout", {found.layout for found in modules.values()}),
        ("group size", {str(found.group_size) for found in modules.values()}),
    ):
        if len(values) > 1 and (kind == "layout" or config.group_size != -1):
            odd.append(f"the modules differ in {kind}: {', '.join(sorted(values))}")
    for word in config.modules_to_not_convert or ():
        hit = [name for name in modules if word in name]
        if hit:
            odd.append(
                f"modules_to_not_convert names {word!r}, but {len(hit)} such modules are quantized ({hit[0]}): "
                "they are loaded as quantized"
            )
        elif not any(word in name for name in opened.headers):
            odd.append(f"modules_to_not_convert names {word!r}, which is nowhere in the files")
    extra = config.model_extra or {}
    ours = isinstance(extra.get("meta"), dict) and "made_by" in extra["meta"]  # what `awq quantize` says of its run
    if unknown := [key for key in extra if key != "meta" or not ours]:
        odd.append(f"the config has keys that awq-core does not read, and keeps: {', '.join(unknown)}")
    return odd + _head(opened)


def _head(opened: Opened) -> list[str]:
    has_head = any(name.startswith("lm_head.") for name in opened.headers)
    tied = opened.model.get("tie_word_embeddings")
    if tied and not has_head:
        return ["lm_head is tied to the token embedding and takes no memory of its own"]
    if tied:
        return ["config.json ties lm_head to the token embedding, but the files hold an lm_head too"]
    if tied is False and not has_head:
        return ["config.json does not tie lm_head to the token embedding, but the files hold no lm_head"]
    return []
