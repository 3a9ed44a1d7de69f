"""The decoders that we know, as data, and reading one of them into a ``Decoder``.

A model is known by the classes that it is made of, every one of them: a subclass, or a family that looks alike, may
compute something else, and then the model simply runs without the fast step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .model import Attention, Decoder, Layer, Mlp, Norm, Rope, Unsupported

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}
MODELS = "transformers.models"
CAPTURING = "transformers.utils.output_capturing"
CHANGING_ROPE = {"dynamic", "longrope"}  # frequencies that depend on the length so far


@dataclass(frozen=True)
class Family:
    """How the modules of one architecture differ from Llama's.

    ``windows``: where the sliding window comes from, ``none``, ``all`` layers (``config.sliding_window``) or
    ``layer_types``. ``sandwich``: norms after attention and MLP as well. ``packed``: qkv and gate-up are one linear.
    """

    name: str
    windows: str = "none"
    offset_norm: bool = False
    sandwich: bool = False
    qk_norm: bool = False
    packed: bool = False
    scaled_embedding: bool = False
    layer_ropes: bool = False
    activation: str = "hidden_act"
    model: str = ""  # where its base model is not called NameModel


FAMILIES = {
    family.name: family
    for family in (
        Family("Llama"),
        Family("Mistral", windows="all"),
        Family("Qwen2", windows="layer_types"),
        Family("Qwen3", windows="layer_types", qk_norm=True),
        Family("Phi3", windows="all", packed=True),
        Family("Gemma", offset_norm=True, scaled_embedding=True),
        Family(
            "Gemma2",
            windows="layer_types",
            offset_norm=True,
            sandwich=True,
            scaled_embedding=True,
            activation="hidden_activation",
        ),
        Family(
            "Gemma3",
            windows="layer_types",
            offset_norm=True,
            sandwich=True,
            qk_norm=True,
            scaled_embedding=True,
            layer_ropes=True,
            activation="hidden_activation",
            model="Gemma3TextModel",
        ),
    )
}

Joined = Callable[[nn.Module], nn.Module | None]
"""For an attention or MLP module: the joined linear (qkv, gate-up) that stands in for its projections, or None."""


def nothing_joined(module: nn.Module) -> nn.Module | None:
    """The ``Joined`` of a model whose projections are as transformers made them."""
    return None


def read(model: Any, joined: Joined = nothing_joined) -> Decoder:
    """The decoder in a causal language model of transformers. Unsupported (with the reason) where we don't know it."""
    family = _family(model)
    config, base = model.config, model.model
    _check_config(config)
    _expect(base, family.model or f"{family.name}Model")
    _expect(base.embed_tokens, f"{family.name}TextScaledWordEmbedding" if family.scaled_embedding else "Embedding")
    layers = tuple(_layer(layer, config, i, family, joined) for i, layer in enumerate(base.layers))
    if len(layers) != config.num_hidden_layers:
        raise Unsupported(f"it has {len(layers)} layers and its config says {config.num_hidden_layers}")
    decoder = Decoder(
        embedding=base.embed_tokens.weight,
        layers=layers,
        norm=_norm(base.norm, family),
        head=model.lm_head,
        ropes=_ropes(base.rotary_emb, config, family),
        embedding_scale=_scale(base.embed_tokens) if family.scaled_embedding else None,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    _check_places(model, decoder)
    for name, module in base.named_modules():
        if name and listeners(module):
            raise Unsupported(f"{name} has a forward hook, or a forward of its own, that the step would pass by")
    return decoder


def listeners(module: nn.Module) -> int:
    """How many hooks (and replaced forwards) would not be called; those that transformers leaves behind do nothing."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own = sum(getattr(hook, "__module__", "") != CAPTURING for hook in hooks)
    return int(own) + ("forward" in module.__dict__)


def knows(model: Any) -> bool:
    """Whether the model's own class is one of those that are known."""
    name, place = type(model).__name__, type(model).__module__
    family = name.removesuffix("ForCausalLM")
    return name == f"{family}ForCausalLM" and family in FAMILIES and place.startswith(f"{MODELS}.{family.lower()}.")


def _family(model: Any) -> Family:
    name = type(model).__name__
    if not knows(model):
        raise Unsupported(f"{name} is not a causal language model of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name.removesuffix("ForCausalLM")]


def _expect(module: Any, name: str) -> None:
    if type(module).__name__ != name:
        raise Unsupported(f"a module is a {type(module).__name__} where a {name} was expected")


def _check_config(config: Any) -> None:
    kind = getattr(config, "_attn_implementation", None) or "eager"
    if kind not in ATTENTION:
        raise Unsupported(f"its attention implementation {kind!r} is not one that we know")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise Unsupported("its attention is not causal")


def _norm(module: Any, family: Family) -> Norm:
    if type(module).__name__ != f"{family.name}RMSNorm":
        raise Unsupported(f"a norm is a {type(module).__name__}, not a {family.name}RMSNorm")
    eps = module.eps if family.offset_norm else module.variance_epsilon
    return Norm(module.weight, float(eps), family.offset_norm)


def _layer(layer: Any, config: Any, index: int, family: Family, joined: Joined) -> Layer:
    _expect(layer, f"{family.name}DecoderLayer")
    names = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    after_attention = after_mlp = None
    if family.sandwich:
        after_attention, before_mlp, after_mlp = (_norm(getattr(layer, name), family) for name in names)
    else:
        before_mlp = _norm(layer.post_attention_layernorm, family)
    return Layer(
        before_attention=_norm(layer.input_layernorm, family),
        attention=_attention(layer.self_attn, config, index, family, joined),
        before_mlp=before_mlp,
        mlp=_mlp(layer.mlp, config, family, joined),
        after_attention=after_attention,
        after_mlp=after_mlp,
    )


def _attention(module: Any, config: Any, index: int, family: Family, joined: Joined) -> Attention:
    _expect(module, f"{family.name}Attention")
    one = joined(module)
    if one is not None:
        qkv: tuple[nn.Module, ...] = (one,)
    else:
        qkv = (module.qkv_proj,) if family.packed else (module.q_proj, module.k_proj, module.v_proj)
    kinds = getattr(config, "layer_types", None)
    softcap = getattr(module, "attn_logit_softcapping", None) if family.name == "Gemma2" else None
    if getattr(config, "_attn_implementation", None) == "sdpa":
        softcap = None  # it knows no soft cap: older releases of transformers leave it out without a word
    return Attention(
        qkv=qkv,
        o=module.o_proj,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=module.head_dim,
        scaling=float(module.scaling),
        window=_window(config, index, family),
        softcap=None if softcap is None else float(softcap),
        q_norm=_norm(module.q_norm, family) if family.qk_norm else None,
        k_norm=_norm(module.k_norm, family) if family.qk_norm else None,
        rope=kinds[index] if family.layer_ropes and kinds else "",
    )


def _window(config: Any, index: int, family: Family) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    if family.windows == "none":
        return None
    if family.windows == "all":
        return window
    kind = config.layer_types[index]
    if kind not in ("full_attention", "sliding_attention"):
        raise Unsupported(f"layer {index} is of the kind {kind}")
    return window if kind == "sliding_attention" else None


def _mlp(module: Any, config: Any, family: Family, joined: Joined) -> Mlp:
    _expect(module, f"{family.name}MLP")
    one = joined(module)
    name = getattr(config, family.activation)
    activation = ACTIVATIONS.get(name)
    if activation is None:
        raise Unsupported(f"its activation {name!r} is not among {', '.join(ACTIVATIONS)}")
    if one is not None:
        gate_up: tuple[nn.Module, ...] = (one,)
    else:
        gate_up = (module.gate_up_proj,) if family.packed else (module.gate_proj, module.up_proj)
    return Mlp(gate_up, module.down_proj, activation)


def _ropes(module: Any, config: Any, family: Family) -> dict[str, Rope]:
    kinds = sorted(set(config.layer_types)) if family.layer_ropes else [""]
    types = module.rope_type if isinstance(module.rope_type, Mapping) else dict.fromkeys(kinds, module.rope_type)
    for kind in types.values():
        if kind in CHANGING_ROPE:
            raise Unsupported(f"its rope scaling {kind!r} changes with the length")
    return {kind: functools.partial(_cos_sin, module, kind) for kind in kinds}


@torch.no_grad()
def _cos_sin(module: Any, kind: str, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own cosines and sines of positions 0 to length - 1, each [length, R], rounded as the model does."""
    device = next(module.buffers()).device
    like = torch.empty(0, dtype=dtype, device=device)
    positions = torch.arange(length, device=device).unsqueeze(0)
    cos, sin = module(like, positions, kind) if kind else module(like, positions)
    return cos[0], sin[0]


def _scale(embedding: Any) -> torch.Tensor:
    scale: torch.Tensor = embedding.embed_scale
    return scale.to(embedding.weight.dtype)


def _check_places(model: Any, decoder: Decoder) -> None:
    places = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(places) > 1 or next(iter(places)).type == "meta":
        raise Unsupported(f"it lies on more than one device ({', '.join(sorted(map(str, places)))})")
    if next(iter(places)).type not in ("cpu", "cuda"):
        raise Unsupported(f"it lies on {next(iter(places))}")
    if decoder.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise Unsupported(f"its dtype is {decoder.dtype}")
