"""AutoAWQ's options in the words of awq-core, for ``autoawq``."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig
from transformers.utils import logging

from ..config import CheckpointConfig, canonical_version
from ..errors import CheckpointError, ConfigError
from ..notice import tell
from ..packed import DTYPE_NAMES

# Options of transformers' own loading that AutoAWQ named with a default: transformers 5 always does it so.
ALWAYS = {"low_cpu_mem_usage": "weights never pass through memory twice", "use_safetensors": "safetensors come first"}
BOUNDS = "it bounds memory in a search that awq-core does in another way"
IGNORED = {
    "split": "calib_data is a text, not a data set of the hub",
    "text_column": "the field is found by its name (text, content, prompt, question or messages)",
    "n_parallel_calib_samples": BOUNDS,
    "max_chunk_memory": BOUNDS,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def folder_of(path: str | Path, download: Mapping[str, Any] | None) -> Path:
    """The folder itself, or where the hub's files of that name lie once they are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).is_absolute() or str(path).count("/") > 1:
        raise CheckpointError(f"{path}: no such folder")
    try:
        return Path(snapshot_download(str(path), **(download or {})))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise CheckpointError(f"{path} is no folder here, and was not found on the hub: {why}") from error


def without_always(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options but those of ``ALWAYS``, which are told."""
    for name in ALWAYS.keys() & options.keys():
        tell(f"AutoAWQForCausalLM.{method}: {name} has no effect: {ALWAYS[name]}")
    return {name: value for name, value in options.items() if name not in ALWAYS}


def named_file(path: str | Path, filename: str, trust_remote_code: bool) -> dict[str, Any]:
    """What makes ``from_pretrained`` read ``filename`` of the folder."""
    if filename in ("", "model.safetensors", "model.safetensors.index.json"):
        return {}
    if not filename.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(
            f"{path}: filename {filename!r} is not a safetensors file: leave it out, and pytorch_model.bin "
            "is read if it is there"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config.transformers_weights = filename
    return {"config": config}


def quantizer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """``quant_config`` in the words of ``quantize``."""
    checked = CheckpointConfig.from_dict(given, "quant_config")
    if checked.model_extra:
        raise ConfigError(f"quant_config: there is no option {next(iter(checked.model_extra))!r}")
    version = canonical_version(checked.version or "gemm")
    return {
        "layout": version.replace("-", "_"),
        "group_size": checked.group_size if {"group_size", "q_group_size"} & given.keys() else None,
        "zero_point": checked.zero_point,
        "modules_to_not_convert": checked.modules_to_not_convert or (),
    }


def dtype_name(dtype: Any) -> str:
    """The dtype of the tensors that stay dense; AutoAWQ's checkpoints hold float16 unless another one was named."""
    if dtype in (None, "auto"):
        return "float16"
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def size_in_bytes(size: str | int) -> int:
    """``"5GB"`` in bytes (powers of ten); ConfigError for what is no size."""
    found = re.fullmatch(r"\s*(\d+)\s*([KMGT]?)I?B?\s*", str(size).upper())
    if found is None or int(found[1]) == 0:
        raise ConfigError(f'shard_size is {size!r}, but it must be a number of bytes or a size such as "5GB"')
    return int(found[1]) * int(1000 ** " KMGT".index(found[2] or " "))


def check_ignored(options: Mapping[str, Any]) -> None:
    """Tell of what has no effect; ConfigError for what cannot be done or does not exist."""
    for name, value in options.items():
        if name == "export_compatible":
            if value:
                raise ConfigError(
                    "AutoAWQForCausalLM.quantize: export_compatible=True is not supported: "
                    "`awq quantize --export-dense` writes the model dense, with the scales in it"
                )
        elif name in IGNORED:
            tell(f"AutoAWQForCausalLM.quantize: {name} has no effect: {IGNORED[name]}")
        else:
            raise ConfigError(f"AutoAWQForCausalLM.quantize: there is no option {name!r}")


def calibration(data: Any, folder: Path) -> Path | None:
    """The file that holds the calibration text; a list of texts is written into ``folder``."""
    if data is None:
        return None
    if data == "pileval":
        tell(
            "AutoAWQForCausalLM.quantize: calib_data='pileval' is not downloaded: the text that travels with awq-core "
            "is used; give a file for another one"
        )
        return None
    if isinstance(data, str | Path):
        if not Path(data).exists():
            raise ConfigError(
                f"calib_data is {str(data)!r}, which is no file or folder here: data sets of the hub are not "
                "downloaded; save the texts to a .txt or .jsonl file and give its path"
            )
        return Path(data)
    texts = list(data)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError("calib_data must be a file, a folder or a list of texts; lists of tokens are not taken")
    file = folder / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def with_tokenizer(source: Path, tokenizer: Any, folder: Path) -> Path:
    """``source``, or where it holds no tokenizer, a folder of links to its files with the one that was given."""
    if tokenizer is None or any((source / name).is_file() for name in TOKENIZER_FILES):
        return source
    made = folder / "dense"
    tokenizer.save_pretrained(made)
    for file in source.iterdir():
        if file.is_file() and not (made / file.name).exists():
            os.symlink(file.resolve(), made / file.name)
    return made


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar of transformers' kind, which ``disable_progress_bar`` silences."""
    with logging.tqdm(desc="quantizing") as bar:
        before: list[int] = []

        def progress(done: int, total: int, name: str) -> None:
            if before != [total]:  # first the blocks are searched, then the tensors written
                before[:] = [total]
                bar.reset(total)
            bar.update(1)

        yield progress
