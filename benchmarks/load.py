"""Load time and peak memory of a synthetic AWQ checkpoint of about 1B parameters, beside plain safetensors reading.

Each measurement runs in a process of its own. Memory is the peak above what the process had after its imports:
"anonymous" is what cannot be dropped, "resident" counts the mapped pages of the file too, which the kernel drops when
it must.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}


def make(folder: Path, layers: int, group_size: int) -> int:
    """Write a TinyLlama-shaped checkpoint with random codes; returns the number of parameters that it stands for."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=32000, architectures=["LlamaForCausalLM"])
    config.dtype = "float16"
    data = config.to_dict() | {
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    hidden, inner, kv = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["hidden_size"] // 8
    tensors: dict[str, torch.Tensor] = {}
    parameters = 0

    def dense(name: str, *shape: int) -> None:
        nonlocal parameters
        tensors[name] = (torch.randn(*shape) * 0.02).half()
        parameters += tensors[name].numel()

    def linear(name: str, k: int, n: int) -> None:
        nonlocal parameters
        tensors[f"{name}.qweight"] = torch.randint(-(2**31), 2**31 - 1, (k, n // 8), dtype=torch.int32)
        tensors[f"{name}.qzeros"] = torch.randint(-(2**31), 2**31 - 1, (k // group_size, n // 8), dtype=torch.int32)
        tensors[f"{name}.scales"] = (torch.rand(k // group_size, n) * 0.01 + 1e-3).half()
        parameters += k * n

    dense("model.embed_tokens.weight", 32000, hidden)
    dense("lm_head.weight", 32000, hidden)
    dense("model.norm.weight", hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        dense(f"{layer}.input_layernorm.weight", hidden)
        dense(f"{layer}.post_attention_layernorm.weight", hidden)
        for name, k, n in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden, kv),
            ("self_attn.v_proj", hidden, kv),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ):
            linear(f"{layer}.{name}", k, n)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return parameters


def memory_kb(field: str) -> int:
    """A line of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


class Peak:
    """Samples the process's memory while the block runs."""

    def __enter__(self) -> Peak:
        self.start = {field: memory_kb(field) for field in ("RssAnon", "VmRSS")}
        self.peak = dict(self.start)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        self.began = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.005):
            self._look()

    def _look(self) -> None:
        for field in self.peak:
            self.peak[field] = max(self.peak[field], memory_kb(field))

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self._look()
        self.done.set()
        self.thread.join()

    def report(self) -> dict[str, float]:
        """Seconds, and MB above the start."""
        return {
            "seconds": self.seconds,
            "anonymous_mb": (self.peak["RssAnon"] - self.start["RssAnon"]) / 1e3,
            "resident_mb": (self.peak["VmRSS"] - self.start["VmRSS"]) / 1e3,
        }


def read_plainly(folder: Path) -> dict[str, float]:
    """Every tensor of the file copied into memory."""
    from safetensors.torch import load_file

    with Peak() as peak:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert tensors
    return peak.report()


def load_model(folder: Path, dtype: str) -> dict[str, float]:
    """from_pretrained, every linear bound; then one forward, to show that nothing was put off."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama  # noqa: F401 (imported before the clock starts)

    import awq_core

    awq_core.enable()
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    began = time.perf_counter()
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3, 4]]))
    return peak.report() | {"first_forward_seconds": time.perf_counter() - began}


def drop_cache(file: Path) -> None:
    """Ask the kernel to forget the file's pages, so that the next read comes from the disk."""
    import os

    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(file: Path) -> None:
    """Read the file once: a kernel that reclaims idle pages may have forgotten it since the last measurement."""
    with file.open("rb") as opened:
        while opened.read(1 << 24):
            pass


def measure(folder: Path, what: str, cold: bool) -> dict[str, float]:
    """Run one measurement in a new process."""
    (drop_cache if cold else fill_cache)(folder / "model.safetensors")
    done = subprocess.run(
        [sys.executable, __file__, "--inner", what, "--folder", str(folder)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22, help="22 gives 1.1B parameters")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        report = read_plainly(args.folder) if args.inner == "read" else load_model(args.folder, args.inner)
        print(json.dumps(report))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        parameters = make(folder, args.layers, args.group_size)
        size = (folder / "model.safetensors").stat().st_size / 1e6
        console = Console(width=160)
        console.print(
            f"{parameters / 1e9:.2f}B parameters, file {size:.0f} MB, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, median (best) of {args.repeat}"
        )
        table = Table(
            "what",
            "cache",
            "seconds",
            "of reading",
            "peak anonymous MB",
            "of file",
            "peak resident MB",
            "1st forward s",
        )
        for cold in (False, True):
            taken: dict[str, list[dict[str, float]]] = {}
            for _ in range(args.repeat):  # in turns, so that a change of the machine's speed meets all of them
                for what in ("read", *args.dtypes):
                    taken.setdefault(what, []).append(measure(folder, what, cold))
            reading = None
            for what, runs in taken.items():
                runs.sort(key=lambda r: r["seconds"])
                run, best = runs[len(runs) // 2], runs[0]["seconds"]
                reading = reading or run["seconds"]
                table.add_row(
                    "safetensors reading" if what == "read" else f"from_pretrained {what}",
                    "cold" if cold else "warm",
                    f"{run['seconds']:.2f} ({best:.2f})",
                    f"{run['seconds'] / reading:.2f}x",
                    f"{run['anonymous_mb']:.0f}",
                    f"{run['anonymous_mb'] / size:.2f}x",
                    f"{run['resident_mb']:.0f}",
                    f"{run.get('first_forward_seconds', 0):.2f}" if what != "read" else "",
                )
        console.print(table)


if __name__ == "__main__":
    main()
