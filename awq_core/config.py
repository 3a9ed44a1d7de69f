"""What a checkpoint says about itself and what a user asks for: two pydantic models, every refusal one sentence.

``CheckpointConfig`` reads the ``quantization_config`` of a config.json, or a legacy quant_config.json. It is lenient:
keys that we don't know are kept and written back. ``UserOptions`` reads the arguments of ``AwqConfig(...)``. It is
strict: an unknown option is refused, never dropped. Neither imports torch or transformers.
"""

from __future__ import annotations

import copy
import difflib
import reprlib
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import ConfigError

VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin", "exllama", "ipex")
USER = "AwqConfig"

_ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
_NULLABLE = frozenset({"zero_point", "version", "backend", "quant_method", "modules_to_not_convert", "lm_head"})
_REQUESTS = {"ipex": "cpu", "gemv-fast": "gemv", "llm-awq": "gemv"}
# What other tools and older files call an option; difflib cannot guess these.
_OTHER_NAMES = {**_ALIASES, "format": "version", "checkpoint_format": "version", "sym": "zero_point"}
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "True or False",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than": "greater than 0",
    "string_too_short": "a name that is not empty",
}


def canonical_version(version: str) -> str:
    """The usual spelling of a version: case is ignored and ``_`` is ``-``; a name that we don't know stays as it is."""
    key = version.strip().lower().replace("_", "-")
    return next((name for name in VERSIONS if name.replace("_", "-") == key), version)


def _plain(value: Any) -> Any:
    """The value of an enum member: transformers' own enums are welcome wherever a string or number is."""
    return value.value if isinstance(value, Enum) else value


def _four_bits(bits: int) -> int:
    if bits != 4:
        raise ValueError(
            f"bits is {bits}, but awq-core runs 4-bit AWQ weights only; for 2, 3 or 8 bits take a GPTQ checkpoint, "
            "or bitsandbytes for 8 bits."
        )
    return bits


def _whole_groups(group_size: int) -> int:
    if group_size != -1 and (group_size <= 0 or group_size % 16):
        raise ValueError(
            f"group_size is {group_size}, but it must be -1 (one group for all input features) or a positive "
            "multiple of 16, usually 128 or 64."
        )
    return group_size


def _check_zero_point(version: str | None, zero_point: bool) -> None:
    if zero_point and version == "marlin":
        raise ValueError("zero_point is True, but version marlin stores no zero points; set zero_point to False.")
    if not zero_point and version in ("gemv", "gemv_fast", "llm-awq"):
        raise ValueError(f"zero_point is False, but version {version} always stores zero points; set it to True.")


Bits = Annotated[int, AfterValidator(_four_bits)]
GroupSize = Annotated[int, AfterValidator(_whole_groups)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
PlainStr = Annotated[str, BeforeValidator(_plain)]


class CheckpointConfig(BaseModel):
    """What a checkpoint says. Aliases are resolved, None means "not said", and unknown keys are in ``model_extra``.

    ``version`` is a claim about the layout, None when the file makes none; the bytes' own header decides.
    ``group_size`` is as stored: -1 stands for all input features. ``CheckpointConfig(where, **keys)`` raises
    ConfigError; ``where`` names the file in messages.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    bits: Bits = 4
    group_size: GroupSize = 128
    zero_point: bool = True
    version: PlainStr | None = None
    backend: PlainStr | None = None
    quant_method: PlainStr = "awq"
    modules_to_not_convert: list[Name] | None = None
    lm_head: bool = False
    _where: str = PrivateAttr()
    _raw: dict[str, Any] = PrivateAttr()

    def __init__(self, where: str = "quantization_config", /, **raw: Any) -> None:
        try:
            super().__init__(**raw)
        except ValidationError as error:
            raise _refusal(error, where, type(self)) from None
        self._where = where
        self._raw = copy.deepcopy(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "quantization_config") -> CheckpointConfig:
        """Read the keys as they stand in the file ``where``; ConfigError if they break a rule."""
        if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
            raise ConfigError(f"{where}: the quantization config must be a mapping of names, not {_short(raw)}.")
        return cls(where, **raw)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values exactly as they were read, aliases and unknown keys too, and ``quant_method: "awq"``."""
        return {**copy.deepcopy(self._raw), "quant_method": "awq"}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd but no reason to refuse, a sentence each."""
        if self.version is None or self.version in VERSIONS:
            return ()
        return (
            f"{self._where}: version {self.version!r} is not one that awq-core knows, "
            "so the layout is taken from the weights' header alone.",
        )

    @model_validator(mode="before")
    @classmethod
    def _resolve_aliases(cls, raw: dict[str, Any]) -> dict[str, Any]:
        data = {key: value for key, value in raw.items() if value is not None or key not in _NULLABLE}
        for alias, name in _ALIASES.items():
            if alias in data:
                value = data.pop(alias)
                if data.setdefault(name, value) != value:
                    raise ValueError(
                        f"{name} is {_short(data[name])} but {alias}, an older name for it, is {_short(value)}; "
                        "keep the one that is right."
                    )
        version = _plain(data.get("version"))
        data.setdefault("zero_point", not (isinstance(version, str) and canonical_version(version) == "marlin"))
        return data

    @field_validator("version")
    @classmethod
    def _name_version(cls, version: str | None) -> str | None:
        return None if version is None else canonical_version(version)

    @field_validator("quant_method")
    @classmethod
    def _only_awq(cls, method: str) -> str:
        # awq_core is the name under which transformers' public registry knows us; files always say awq.
        if method.lower() not in ("awq", "awq_core"):
            raise ValueError(f"quant_method is {method!r}, but awq-core reads AWQ checkpoints only.")
        return "awq"

    @model_validator(mode="after")
    def _zero_point_fits(self) -> CheckpointConfig:
        _check_zero_point(self.version, self.zero_point)
        return self


class ExllamaOptions(BaseModel):
    """``exllama_config``: ``max_input_len`` (tokens) and ``max_batch_size`` (sequences) bound the scratch memory."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Annotated[int, BeforeValidator(_plain)]
    max_input_len: Positive = 2048
    max_batch_size: Positive = 8

    @model_validator(mode="before")
    @classmethod
    def _has_version(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "version" not in data:
            raise ValueError("`exllama_config` needs to have a `version` key.")
        return data

    @field_validator("version")
    @classmethod
    def _one_or_two(cls, version: int) -> int:
        if version not in (1, 2):
            raise ValueError(f"Only supported versions are in [1, 2] - not recognized version {version}.")
        return version


class FusingMap(BaseModel):
    """``modules_to_fuse``: attribute names inside a block, in order, and the sizes of its attention.

    ``attention`` is query, key, value, output, or packed qkv and output; ``mlp`` is gate, up, down, or packed gate-up
    and down; an empty list fuses nothing. ``rope_theta`` and ``max_seq_len``, which old mappings may carry, are
    accepted: fused blocks use the model's own.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    hidden_size: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    mlp: list[Name]
    attention: list[Name]
    layernorm: list[Name]
    use_alibi: bool
    rope_theta: Annotated[float, Field(gt=0)] | None = None
    max_seq_len: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        if isinstance(data, Mapping) and (missing := [name for name in required if name not in data]):
            raise ValueError(f"Required fields are missing in the fusing mapping, the missing fields are {missing}.")
        return data

    @model_validator(mode="after")
    def _sizes_fit(self) -> FusingMap:
        if len(self.attention) not in (0, 2, 4):
            raise ValueError(
                f"modules_to_fuse['attention'] has {len(self.attention)} name(s), but it must list query, key, value "
                "and output, or packed qkv and output, or be empty."
            )
        if len(self.mlp) not in (0, 2, 3):
            raise ValueError(
                f"modules_to_fuse['mlp'] has {len(self.mlp)} name(s), but it must list gate, up and down, or packed "
                "gate-up and down, or be empty."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"modules_to_fuse has {self.num_attention_heads} num_attention_heads, which is not a multiple of its "
                f"{self.num_key_value_heads} num_key_value_heads."
            )
        return self


class UserOptions(BaseModel):
    """What a user asks for with ``AwqConfig(...)``: the options of transformers 4, checked. Raises ConfigError.

    ``version`` is a request for a backend family (see ``request``), None for none. ``do_fuse`` left out is True when
    ``modules_to_fuse`` says something. ``fuse_max_seq_len`` counts tokens, prompt and answer together; without fusing
    it has no effect, which is a UserWarning.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    bits: Bits = 4
    group_size: GroupSize = 128
    zero_point: bool = True
    version: PlainStr | None = None
    backend: PlainStr | None = None
    do_fuse: bool = False
    fuse_max_seq_len: Positive | None = None
    modules_to_fuse: FusingMap | None = None
    modules_to_not_convert: list[Name] | None = None
    exllama_config: ExllamaOptions | None = None
    _explicit: frozenset[str] = PrivateAttr()

    def __init__(self, /, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise _refusal(error, USER, type(self)) from None
        self._explicit = frozenset(name for name, value in options.items() if value is not None)
        if self.fuse_max_seq_len is not None and not self.do_fuse:
            warnings.warn(
                f"{USER}: fuse_max_seq_len has no effect without do_fuse=True or modules_to_fuse.",
                UserWarning,
                stacklevel=2,
            )

    @property
    def explicit(self) -> frozenset[str]:
        """The options that the user named, defaults named on purpose among them; None counts as not named."""
        return self._explicit

    @property
    def request(self) -> str | None:
        """The backend family asked for, in lower case; any name may stand here, dispatch knows which exist."""
        if self.version is None:
            return None
        name = self.version.strip().lower()
        return _REQUESTS.get(name.replace("_", "-"), name)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was understood in another way than it was written, a sentence each."""
        notes = []
        if self.version is not None and self.request != self.version.strip().lower():
            notes.append(f"{USER}: version {self.version!r} is taken as a request for the {self.request!r} backend.")
        if self.backend == "llm-awq":
            notes.append(
                f"{USER}: backend 'llm-awq' has no effect, since the layout is taken from the weights' header."
            )
        if self.exllama_config is not None and self.request != "exllama":
            notes.append(f"{USER}: exllama_config has no effect without version='exllama'.")
        return tuple(notes)

    @model_validator(mode="before")
    @classmethod
    def _resolve_defaults(cls, options: dict[str, Any]) -> dict[str, Any]:
        data = dict(options)
        if data.get("do_fuse") is None:
            data["do_fuse"] = bool(data.get("modules_to_fuse"))
        if data.get("modules_to_fuse") == {} and data["do_fuse"] is False:
            data["modules_to_fuse"] = None
        version = _plain(data.get("version"))
        if isinstance(version, str) and version.strip().lower() == "exllama" and data.get("exllama_config") is None:
            data["exllama_config"] = {"version": 2}
        return data

    @field_validator("version")
    @classmethod
    def _version_named(cls, version: str | None) -> str | None:
        if version is not None and not version.strip():
            raise ValueError("version is empty; name a backend, such as gemm, gemv, exllama or cpu, or leave it out.")
        return version

    @field_validator("backend")
    @classmethod
    def _known_backend(cls, backend: str | None) -> str | None:
        # "auto" is the default of transformers 5, so its users may write it.
        if backend is not None and backend.lower() not in ("autoawq", "llm-awq", "auto"):
            raise ValueError(
                "Only supported quantization backends in autoawq and llm-awq - not recognized backend "
                f"{_short(backend)}; to choose a kernel, use version."
            )
        return None if backend is None else backend.lower()

    @model_validator(mode="after")
    def _options_fit(self) -> UserOptions:
        if self.do_fuse and self.fuse_max_seq_len is None:
            raise ValueError(
                "You cannot enable fused modules without specifying a `fuse_max_seq_len`, make sure to pass a valid "
                "`fuse_max_seq_len` for your usecase."
            )
        if self.version is not None and "zero_point" in self.model_fields_set:
            _check_zero_point(canonical_version(self.version), self.zero_point)
        return self


_NESTED: dict[object, type[BaseModel]] = {"exllama_config": ExllamaOptions, "modules_to_fuse": FusingMap}


def _refusal(error: ValidationError, where: str, model: type[BaseModel]) -> ConfigError:
    """The first problem of a pydantic error as one sentence that names the field and where it stands."""
    first = error.errors(include_url=False)[0]
    path, kind, got = first["loc"], first["type"], first["input"]
    if kind == "value_error":
        return ConfigError(f"{where}: {first['ctx']['error']}")
    name = ".".join(map(str, path))
    if kind == "extra_forbidden":
        options = [*_NESTED.get(path[0], model).model_fields] if len(path) > 1 else [*model.model_fields]
        return ConfigError(f"{where}: there is no option {name!r}; {_did_you_mean(str(path[-1]), options)}")
    return ConfigError(f"{where}: {name} must be {_WANTED.get(kind, 'valid')}, not {_short(got)}.")


def _did_you_mean(name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), options, n=1)
    guess = _OTHER_NAMES.get(name) if _OTHER_NAMES.get(name) in options else next(iter(close), None)
    return f"did you mean {guess!r}?" if guess else f"the options are {', '.join(options)}."


def _short(value: object) -> str:
    """A value in one short line."""
    return " ".join(reprlib.repr(value).split())
