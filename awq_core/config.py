"""What a checkpoint says about itself, as a pydantic model; every refusal is one sentence.

``CheckpointConfig`` reads the ``quantization_config`` of a config.json, or a legacy quant_config.json. It is lenient:
keys that we don't know are kept and written back. What a user asks for stands in ``options``, which shares the types
and the wording of this file. Neither imports torch or transformers.
"""

from __future__ import annotations

import copy
import reprlib
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
ALIASES = {"w_bit": "bits", "q_group_size": "group_size"}
_NULLABLE = frozenset({"zero_point", "version", "backend", "quant_method", "modules_to_not_convert", "lm_head"})
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


def plain(value: Any) -> Any:
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


def check_zero_point(version: str | None, zero_point: bool) -> None:
    """ValueError where the canonical ``version`` is one that cannot go with this ``zero_point``."""
    if zero_point and version == "marlin":
        raise ValueError("zero_point is True, but version marlin stores no zero points; set zero_point to False.")
    if not zero_point and version in ("gemv", "gemv_fast", "llm-awq"):
        raise ValueError(f"zero_point is False, but version {version} always stores zero points; set it to True.")


Bits = Annotated[int, AfterValidator(_four_bits)]
GroupSize = Annotated[int, AfterValidator(_whole_groups)]
Name = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
PlainStr = Annotated[str, BeforeValidator(plain)]


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
            raise refusal(error, where) from None
        self._where = where
        self._raw = copy.deepcopy(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "quantization_config") -> CheckpointConfig:
        """Read the keys as they stand in the file ``where``; ConfigError if they break a rule."""
        if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
            raise ConfigError(f"{where}: the quantization config must be a mapping of names, not {short(raw)}.")
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
        for alias, name in ALIASES.items():
            if alias in data:
                value = data.pop(alias)
                if data.setdefault(name, value) != value:
                    raise ValueError(
                        f"{name} is {short(data[name])} but {alias}, an older name for it, is {short(value)}; "
                        "keep the one that is right."
                    )
        version = plain(data.get("version"))
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
        check_zero_point(self.version, self.zero_point)
        return self


def refusal(error: ValidationError, where: str) -> ConfigError:
    """The first problem of a pydantic error as one sentence that names the field and the place ``where`` it stands."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        return ConfigError(f"{where}: {first['ctx']['error']}")
    name = ".".join(map(str, first["loc"]))
    return ConfigError(f"{where}: {name} must be {_WANTED.get(first['type'], 'valid')}, not {short(first['input'])}.")


def short(value: object) -> str:
    """A value in one short line."""
    return " ".join(reprlib.repr(value).split())
