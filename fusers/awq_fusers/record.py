"""What was fused in a model: the record that ``fuse`` returns and keeps as ``model.awq_fused``."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from awq_core.linear import AwqLinear


@dataclass(frozen=True, eq=False)
class FusedLayer:
    """One decoder layer. The modules are those of the model, so they follow its ``.to()``.

    * ``name``: path of the layer in the model, ``model.layers.0``; ``layer`` is the module there
    * ``attention``: transformers' own attention module, untouched but for its projections
    * ``qkv``: one AwqLinear for query, key and value, outputs in this order along N (``qkv_sizes``); None where the
      attention is not fused. Where the checkpoint packs them already it is that module, and ``qkv_sizes`` has one
      number: the order inside is the model's own business
    * ``qkv_names``: the children of ``attention`` that read it, ``("q_proj", "k_proj", "v_proj")``
    * ``o``: the output projection (an AwqLinear or a dense linear)
    * ``mlp``, ``gate_up``, ``gate_up_names``, ``gate_up_sizes``, ``down``: the same for the MLP, gate first
    """

    name: str
    layer: nn.Module
    attention: nn.Module | None = None
    qkv: AwqLinear | None = None
    qkv_names: tuple[str, ...] = ()
    qkv_sizes: tuple[int, ...] = ()
    o: nn.Module | None = None
    mlp: nn.Module | None = None
    gate_up: AwqLinear | None = None
    gate_up_names: tuple[str, ...] = ()
    gate_up_sizes: tuple[int, ...] = ()
    down: nn.Module | None = None


@dataclass(frozen=True)
class Unfused:
    """A block that stayed as it was, by path, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class FusedRecord:
    """All layers of the model's decoder in order, fused or not, and what was left out.

    ``max_seq_len`` is the longest sequence (prompt and answer, in tokens) that ``generate`` takes; None sets no limit.
    ``notes`` are sentences that the user was told.
    """

    model_type: str
    layers: tuple[FusedLayer, ...]
    max_seq_len: int | None = None
    unfused: tuple[Unfused, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def joined(self) -> int:
        """How many projections were joined into fewer."""
        groups = [(layer.qkv_sizes, layer.gate_up_sizes) for layer in self.layers]
        return sum(len(sizes) for group in groups for sizes in group if len(sizes) > 1)

    def summary(self) -> str:
        """In one line."""
        attention = sum(len(layer.qkv_sizes) > 1 for layer in self.layers)
        mlp = sum(len(layer.gate_up_sizes) > 1 for layer in self.layers)
        text = f"fused {attention} attention and {mlp} MLP blocks of {len(self.layers)} layers"
        return f"{text}; {len(self.unfused)} blocks stayed unfused" if self.unfused else text
