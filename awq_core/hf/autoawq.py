"""``AutoAWQForCausalLM``: AutoAWQ's class for those who come from it, thin over our own functions.

Method names and options are those of AutoAWQ 0.2.9. What an option did there and is not needed here is told once,
through the logger ``awq_core``; what cannot be done is a ConfigError. New code needs none of this: load with
``from_pretrained`` of transformers, quantize with ``awq quantize``.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from ..checkpoint import LEGACY_FILES, checkpoint_files, read_config
from ..config import CheckpointConfig
from ..errors import CheckpointError, ConfigError
from ..notice import tell
from ..quantization.write import WEIGHT_ENDINGS, ShardWriter, copy_side_files, new_folder
from .autoawq_options import (
    calibration,
    check_ignored,
    dtype_name,
    folder_of,
    named_file,
    progress_bar,
    quantizer_options,
    size_in_bytes,
    with_tokenizer,
    without_always,
)
from .config import AwqConfig
from .enable import enable
from .quantize import quantize

NO_MAPPING = "has no fusing mapping"  # AutoAWQ went on unfused there, and fuse_layers=True is its default


class AutoAWQForCausalLM:
    """A model as AutoAWQ's users hold it: made by ``from_pretrained`` or ``from_quantized``, never by itself.

    * ``model``: the transformers model, dense until ``quantize`` has run; loaded when it is first asked for
    * ``quant_config``: what ``quantize`` was given or the checkpoint says; None for a dense model
    * ``is_quantized``
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise ConfigError("AutoAWQForCausalLM is made by its from_pretrained (dense) or from_quantized (AWQ)")

    model_path: str
    quant_config: dict[str, Any] | None
    _model: Any
    _options: dict[str, Any]
    _temporary: bool

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        torch_dtype: Any = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        **model_init_kwargs: Any,
    ) -> AutoAWQForCausalLM:
        """A dense model, to be quantized. Nothing is read but its config until ``quantize`` or ``model`` is asked for.

        ``model_path`` is a folder, or a name on the hub, which is downloaded. ``device_map`` and what else
        transformers' ``from_pretrained`` takes hold for ``model``; quantizing reads the files layer by layer.

        Raises:
            CheckpointError: the model is quantized already, or there is no such folder.
        """
        if not safetensors:
            tell(
                "AutoAWQForCausalLM.from_pretrained: safetensors=False has no effect: the files that are there are read"
            )
        folder = folder_of(model_path, download_kwargs)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) or any((folder / name).is_file() for name in LEGACY_FILES):
            raise CheckpointError(f"{model_path} is quantized already: open it with AutoAWQForCausalLM.from_quantized")
        options = without_always("from_pretrained", model_init_kwargs) | {"trust_remote_code": trust_remote_code}
        return cls._made_of(str(folder), None, options | {"dtype": torch_dtype, "device_map": device_map})

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | Path,
        filename: str = "",
        *,
        max_seq_len: int | None = 2048,
        trust_remote_code: bool = False,
        fuse_layers: bool = True,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = "auto",
        quant_filename: str = "",
        download_kwargs: Mapping[str, Any] | None = None,
        torch_dtype: Any = None,
        version: str | None = None,
        **config_kwargs: Any,
    ) -> AutoAWQForCausalLM:
        """An AWQ checkpoint, loaded by ``AutoModelForCausalLM.from_pretrained`` after ``awq_core.enable()``.

        ``fuse_layers`` is ``do_fuse``, ``max_seq_len`` is ``fuse_max_seq_len``; of an architecture that nobody has a
        fusing mapping for, the model runs unfused, and you are told. ``use_exllama`` and ``use_exllama_v2``
        are ``version="exllama"``, ``use_ipex`` is ``version="cpu"``. ``batch_size`` bounds nothing: any batch runs.
        Everything else goes to ``from_pretrained`` (``max_memory``, ``offload_folder``, ``attn_implementation``, ...).

        Raises:
            ConfigError: two of the kernels are asked for at once, or ``max_seq_len`` is no positive number.
            AwqError: what ``from_pretrained`` raises.
        """
        asked = {"exllama": use_exllama or use_exllama_v2, "cpu": use_ipex}
        named = [name for name, wanted in asked.items() if wanted] + ([version] if version else [])
        if len(named) > 1:
            raise ConfigError(f"AutoAWQForCausalLM.from_quantized: asks for {' and '.join(named)} at once: choose one")
        if batch_size != 1:
            tell(
                "AutoAWQForCausalLM.from_quantized: batch_size has no effect: the cache grows with the batch that comes"
            )
        if not safetensors:
            tell(
                "AutoAWQForCausalLM.from_quantized: safetensors=False has no effect: the files that are there are read"
            )
        options = without_always("from_quantized", config_kwargs) | dict(download_kwargs or {})
        if torch_dtype not in (None, "auto"):
            options["dtype"] = torch_dtype
        options |= {"device_map": device_map, "trust_remote_code": trust_remote_code}
        options |= named_file(quant_path, filename or quant_filename, trust_remote_code)
        request: dict[str, Any] = {"version": named[0]} if named else {}
        fused = {"do_fuse": True, "fuse_max_seq_len": max_seq_len or 2048} if fuse_layers else {}
        made = cls._made_of(str(quant_path), {}, options)
        try:
            made._load(**request, **fused)
        except ConfigError as error:
            if not fuse_layers or NO_MAPPING not in str(error):
                raise
            tell(f"AutoAWQForCausalLM.from_quantized: {made.model_path} runs unfused: {error}")
            made._load(**request)
        made.quant_config = made.config.quantization_config.to_dict()
        made.config.__dict__.pop("transformers_weights", None)  # or it would be saved
        return made

    @classmethod
    def _made_of(cls, path: str, quant_config: dict[str, Any] | None, options: dict[str, Any]) -> AutoAWQForCausalLM:
        made = object.__new__(cls)
        made.model_path, made.quant_config, made._options = path, quant_config, options
        made._model, made._temporary = None, False
        return made

    @property
    def is_quantized(self) -> bool:
        """Whether ``model`` is an AWQ model."""
        return self.quant_config is not None

    @property
    def model(self) -> Any:
        """The transformers model."""
        if self._model is None:
            self._load()
        return self._model

    def _load(self, **request: Any) -> None:
        """Load ``model``, with what is asked of ``AwqConfig``."""
        enable()
        options = self._options | ({"quantization_config": AwqConfig(**request)} if request else {})
        with warnings.catch_warnings():
            # That the request is merged into the checkpoint's config is what we want.
            warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
            self._model = AutoModelForCausalLM.from_pretrained(self.model_path, **options).eval()

    @property
    def config(self) -> Any:
        """The transformers config of ``model``."""
        return self.model.config

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``model.generate`` in inference mode."""
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``model(...)``."""
        return self.model(*args, **kwargs)

    forward = __call__

    def to(self, *args: Any, **kwargs: Any) -> AutoAWQForCausalLM:
        """``model.to(...)``."""
        self.model.to(*args, **kwargs)
        return self

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | None = None,
        calib_data: Any = None,
        duo_scaling: bool = True,
        apply_clip: bool = True,
        max_calib_samples: int | None = None,
        max_calib_seq_len: int = 512,
        **options: Any,
    ) -> None:
        """Quantize the dense model into a temporary checkpoint, which ``model`` then is and ``save_quantized`` writes.

        ``quant_config`` has AutoAWQ's keys: ``zero_point``, ``q_group_size`` (left out: the largest that fits),
        ``w_bit``, ``version`` (the layout that is written), ``modules_to_not_convert``. ``calib_data`` is a file or
        folder of text, or a list of texts; None, like AutoAWQ's default ``pileval``, takes the text that travels with
        awq-core. ``max_calib_samples`` counts windows of ``max_calib_seq_len`` tokens (None: as ``awq quantize``).
        The ``tokenizer`` beside the model is used; the one that is given, where the folder has none. Blocks run on the
        first GPU if there is one. The temporary files go where ``TMPDIR`` says and take about the model's size.

        Raises:
            ConfigError: a key is not known or its value cannot be served, or there is too little text.
            CheckpointError: the model cannot be read, or holds NaN or inf.
        """
        if self.is_quantized:
            raise CheckpointError(f"{self.model_path} is quantized already: quantize the dense model it was made from")
        check_ignored(options)
        if self._options.get("trust_remote_code"):
            tell("AutoAWQForCausalLM.quantize: trust_remote_code has no effect: code of a model is not run")
        arguments = quantizer_options(quant_config or {})
        if max_calib_samples is not None:
            arguments["calib_samples"] = max_calib_samples
        temporary = tempfile.mkdtemp(prefix="awq-core-")
        weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)  # at the latest when Python ends
        folder = Path(temporary)
        with progress_bar() as progress:
            report = quantize(
                with_tokenizer(Path(self.model_path), tokenizer, folder),
                folder / "awq",
                calib=calibration(calib_data, folder),
                calib_length=max_calib_seq_len,
                dtype=dtype_name(self._options.get("dtype")),
                device="cuda" if torch.cuda.is_available() else "cpu",
                duo_scaling=duo_scaling,
                clip=apply_clip,
                progress=progress,
                **arguments,
            )
        for note in report.notes:
            tell(note)
        self._temporary, self._model, self.model_path = True, None, str(report.out)
        self.quant_config = CheckpointConfig.from_dict(read_config(report.out)).to_dict()
        self._options = {name: value for name, value in self._options.items() if name != "dtype"}

    def save_quantized(self, save_dir: str | Path, safetensors: bool = True, shard_size: str | int = "5GB") -> None:
        """Write the AWQ checkpoint with its tokenizer into ``save_dir``, whose other files stay as they are.

        A checkpoint made by ``quantize`` is written with what lies beside the dense model. Of one that was loaded,
        weights and config are written: the quantized ones bit for bit, whatever kernels or fused modules are in use,
        the dense ones in the dtype in which they were loaded.

        Raises:
            ConfigError: ``safetensors=False``, or a ``shard_size`` that is no size.
            CheckpointError: there is nothing quantized, ``save_dir`` holds weights already, or disk full.
        """
        if not safetensors:
            raise ConfigError(
                "AutoAWQForCausalLM.save_quantized: only safetensors are written: leave safetensors=False out"
            )
        if not self.is_quantized:
            raise CheckpointError(f"{self.model_path} is not quantized yet: call quantize() before save_quantized()")
        out = Path(save_dir)
        if out.is_dir() and (found := sorted(f.name for f in out.iterdir() if f.name.endswith(WEIGHT_ENDINGS))):
            raise CheckpointError(f"{out} holds weights already ({found[0]}): choose another folder, or empty this one")
        limit = size_in_bytes(shard_size)
        joins = out.is_dir() and any(out.iterdir())  # a tokenizer was saved there first, as many scripts do
        whole = out.with_name(f".{out.name}.whole") if joins else out
        with new_folder(whole, overwrite=joins) as folder:
            if self._temporary:
                _write_again(Path(self.model_path), folder, limit)
            else:
                self.model.save_pretrained(folder, max_shard_size=limit)
        if joins:
            for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):  # a model only at the end
                if not (out / file.name).exists() or file.name == "config.json":
                    file.replace(out / file.name)
            shutil.rmtree(whole)


def _write_again(source: Path, folder: Path, limit: int) -> None:
    """The checkpoint ``source`` in shards of ``limit`` bytes, one tensor at a time."""
    writer = ShardWriter(folder, limit)
    for file in checkpoint_files(source):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                writer.add(key, opened.get_tensor(key))
    writer.close()
    copy_side_files(source, folder)
    shutil.copyfile(source / "config.json", folder / "config.json")
