"""The way of the data, from files to a forward and back, and the rooms that it passes."""

from __future__ import annotations

from svg import COLOURS, SOFT, Picture

BOX_W, BOX_H = 250, 74


def picture() -> str:
    """Two columns: loading downwards, running on the right; saving goes back up."""
    made = Picture(900, 640, "The way of a weight through awq-core")
    left, right = 40, 520

    def box(x: float, y: float, title: str, lines: list[str], colour: int, w: float = BOX_W + 90) -> None:
        made.box(x, y, w, BOX_H, COLOURS[colour])
        made.text(x + 12, y + 20, title, 13, bold=True)
        made.lines(x + 12, y + 40, lines, 11.5)

    box(left, 30, "files", ["config.json, *.safetensors", "written by AutoAWQ, llm-awq, awq quantize, ..."], 6)
    box(
        left,
        150,
        "checkpoint, headers, layouts",
        ["names, dtypes, shapes: a few kB are read;", "each module's layout, K, N, g"],
        0,
    )
    box(
        left,
        270,
        "hf.skeleton",
        ["dense linears become AwqLinear / AwqExperts,", "empty, with parameters as in the file"],
        0,
    )
    box(
        left,
        390,
        "transformers' loader",
        ["fills the parameters, on their devices", "(device_map, shards, offloading)"],
        6,
    )
    box(left, 510, "linear, experts: bind", ["checkpoint tensors to resident tensors,", "once, on the real device"], 2)
    for y in (30, 150, 270, 390):
        made.path([(left + 150, y + BOX_H), (left + 150, y + 118)], arrow=True)

    box(right, 150, "plugins", ["backends from entry points, each loaded apart,", "with their Capability records"], 4)
    box(
        right,
        270,
        "selection, dispatch",
        ["spec + records + the user's word -> Plan:", "one resident layout, kernels by range of M"],
        1,
    )
    box(
        right, 390, "kernels of a backend", ["prepare, apply, restore", "(reference.py where nothing else takes it)"], 4
    )
    box(
        right,
        510,
        "ops: awq_core::linear",
        ["x [M, K] -> y [M, N], one custom op", "with fake, backward; bands by M inside"],
        2,
    )
    made.path([(right + 170, 224), (right + 170, 268)], arrow=True)
    made.path([(right + 170, 344), (right + 170, 388)], arrow=True)
    made.path([(right + 170, 464), (right + 170, 508)], arrow=True)
    made.path([(left + 340, 535), (450, 535), (450, 290), (right - 2, 290)], arrow=True)
    made.text(458, 362, "spec", 11, SOFT)
    made.path([(right, 325), (470, 325), (470, 565), (left + 342, 565)], arrow=True)
    made.text(476, 480, "plan", 11, SOFT)
    made.path([(left, 560), (18, 560), (18, 66), (left - 2, 66)], arrow=True)
    made.text(60, 622, "save_pretrained: restore gives the checkpoint's bytes back, bit for bit", 12, SOFT)
    return str(made)
