"""What a user asks for with ``AwqConfig(...)``, as pydantic models; every refusal is one sentence.

``UserOptions`` is strict: an unknown option is refused, never dropped.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from .config import (
    ALIASES,
    Bits,
    GroupSize,
    Name,
    PlainStr,
    Positive,
    canonical_version,
    check_zero_point,
    plain,
    refusal,
    short,
)
from .errors import ConfigError

USER = "AwqConfig"

_REQUESTS = {"ipex": "cpu", "gemv-fast": "gemv", "llm-awq": "gemv"}
# What other tools and older files call an option; difflib cannot guess these.
_OTHER_NAMES = {**ALIASES, "format": "version", "checkpoint_format": "version", "sym": "zero_point"}


class ExllamaOptions(BaseModel):
    """``exllama_config``: ``version`` 1 or 2, which are the same kernels here.

    ``max_input_len`` (tokens) and ``max_batch_size`` (sequences) sized a buffer in AutoAWQ, beyond which inputs overran
    it; the kernels here have none, so the two are checked and change nothing.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    version: Annotated[int, BeforeValidator(plain)]
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

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> FusingMap:
        """Check a mapping that is given outside ``AwqConfig``; ConfigError in one sentence."""
        try:
            return cls(**data)
        except ValidationError as error:
            raise refusal(error, "modules_to_fuse") from None

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
            raise _refusal(error) from None
        self._explicit = frozenset(name for name, value in options.items() if value is not None)
        if self.fuse_max_seq_len is not None and not self.do_fuse:
            warnings.warn(
                f"{USER}: fuse_max_seq_len has no effect without do_fuse=True or modules_to_fuse.",
                UserWarning,
                stacklevel=_callers_level(),
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
        if self.exllama_config is not None and self.request == "exllama":
            if self.exllama_config.version == 1:
                notes.append(f"{USER}: exllama_config asks for version 1, which the kernels of version 2 run as well.")
            if self.exllama_config.model_fields_set & {"max_input_len", "max_batch_size"}:
                notes.append(
                    f"{USER}: max_input_len and max_batch_size of exllama_config reserve nothing, since the kernels "
                    "need no buffer that grows with them: longer inputs are right too."
                )
        return tuple(notes)

    @model_validator(mode="before")
    @classmethod
    def _resolve_defaults(cls, options: dict[str, Any]) -> dict[str, Any]:
        data = dict(options)
        if data.get("do_fuse") is None:
            data["do_fuse"] = bool(data.get("modules_to_fuse"))
        if data.get("modules_to_fuse") == {} and data["do_fuse"] is False:
            data["modules_to_fuse"] = None
        version = plain(data.get("version"))
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
                f"{short(backend)}; to choose a kernel, use version."
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
            check_zero_point(canonical_version(self.version), self.zero_point)
        return self


_NESTED: dict[object, type[BaseModel]] = {"exllama_config": ExllamaOptions, "modules_to_fuse": FusingMap}


def _refusal(error: ValidationError) -> ConfigError:
    """One sentence; for an option that does not exist it names the one that was meant."""
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden":
        return refusal(error, USER)
    path = first["loc"]
    model = _NESTED[path[0]] if len(path) > 1 else UserOptions
    name = ".".join(map(str, path))
    return ConfigError(f"{USER}: there is no option {name!r}; {_did_you_mean(str(path[-1]), [*model.model_fields])}")


def _did_you_mean(name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), options, n=1)
    guess = _OTHER_NAMES.get(name) if _OTHER_NAMES.get(name) in options else next(iter(close), None)
    return f"did you mean {guess!r}?" if guess else f"the options are {', '.join(options)}."


def _callers_level() -> int:
    """The ``stacklevel`` of the user's own line: the first frame above the caller that is not of awq_core."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("awq_core."):
        level, frame = level + 1, frame.f_back
    return level
