"""Where the projections of an architecture lie, for joining them: what a plugin offers to ``awq_core_fusers``."""

from __future__ import annotations

from dataclasses import dataclass

from .guard import require

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class FusingMapping:
    """The projections of each decoder layer, by their paths inside the layer. ValueError where a field is wrong.

    * ``model_types``: the ``config.model_type`` of the decoders that are built so (of a model with images or sound,
      that of its language model, like ``gemma3_text``)
    * ``attention``: query, key, value, output; or packed qkv and output; or nothing
    * ``mlp``: gate, up, down; or packed gate-up and down; or nothing. A layer that has none of them (experts) is let be
    * ``layers``: path of the list of layers inside the decoder
    """

    model_types: tuple[str, ...]
    attention: tuple[str, ...] = ATTENTION
    mlp: tuple[str, ...] = MLP
    layers: str = "layers"

    def __post_init__(self) -> None:
        for name, lengths in (("model_types", None), ("attention", (0, 2, 4)), ("mlp", (0, 2, 3))):
            value = getattr(self, name)
            ok = isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
            require(ok, f"FusingMapping.{name}", "a tuple of names", value)
            require(lengths is None or len(value) in lengths, f"FusingMapping.{name}", f"{lengths} names long", value)
        require(bool(self.model_types), "FusingMapping.model_types", "not empty", self.model_types)
        require(isinstance(self.layers, str), "FusingMapping.layers", "a path", self.layers)
