"""Random small models: quantized, saved and loaded, they give the logits of the blocks as they were quantized in place.

A few cases run with the other tests; ``AWQ_FUZZ=200 pytest tests/hf/test_quantize_fuzz.py`` runs many.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from awq_core.hf import search as search_module
from awq_core.hf.decoder import Decoder
from awq_core.hf.quantize import quantize

CASES = int(os.environ.get("AWQ_FUZZ", "6"))
LETTERS = [chr(code) for code in range(32, 126)] + ["\n", "[UNK]"]
GATED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Mixtral", "Qwen3Moe", "Cohere", "Olmo2")
PLAIN = ("OPT", "GPTNeoX", "Falcon")


def random_config(draw: random.Random):
    """A model of some kind, and what to quantize it with."""
    kind = draw.choice(GATED + PLAIN)
    heads, head_dim = draw.choice([1, 2, 4]), draw.choice([16, 32, 64])
    hidden = heads * head_dim
    inner = draw.choice([32, 64, 96, 128, 160])
    sizes = {
        "vocab_size": len(LETTERS),
        "hidden_size": hidden,
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind in GATED:
        sizes |= {"num_key_value_heads": draw.choice([h for h in (1, 2, 4) if heads % h == 0])}
        sizes |= {"intermediate_size": inner, "tie_word_embeddings": draw.random() < 0.5}
    if kind in ("Qwen3", "Gemma", "Gemma2", "Qwen3Moe", "Mistral", "Mixtral"):
        sizes |= {"head_dim": head_dim}
    if kind == "Llama":
        sizes |= {"attention_bias": draw.random() < 0.5, "mlp_bias": draw.random() < 0.5}
    if kind == "Mixtral":
        sizes |= {"num_local_experts": draw.choice([2, 3, 5]), "num_experts_per_tok": 2}
    if kind == "Qwen3Moe":
        sizes |= {"num_experts": draw.choice([2, 4]), "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    if kind == "OPT":
        sizes |= {"ffn_dim": inner, "word_embed_proj_dim": hidden, "do_layer_norm_before": draw.random() < 0.7}
    if kind == "GPTNeoX":
        sizes |= {"intermediate_size": inner, "use_parallel_residual": draw.random() < 0.5}
    if kind == "Falcon":
        sizes |= {"new_decoder_architecture": False, "multi_query": draw.random() < 0.5, "bias": draw.random() < 0.5}
        sizes |= {"parallel_attn": draw.random() < 0.5, "alibi": draw.random() < 0.3}
    options = {
        "group_size": draw.choice([16, 16, 32, None, -1]),
        "layout": draw.choice(["gemm", "gemm", "gemm", "gemv", "gemv_fast"]),
        "zero_point": True,
        "dtype": draw.choice(["float16", "float16", "bfloat16"]),
        "calib_samples": draw.choice([1, 3, 5]),
        "calib_length": draw.choice([24, 40]),
        "seed": draw.randrange(100),
        "scale_steps": draw.choice([0, 3, 10]),
        "clip": draw.random() < 0.7,
        "feedback": draw.random() < 0.7,
        "propagate": draw.random() < 0.5,
        "tie_heads": draw.random() < 0.5,
    }
    if options["layout"] == "gemm" and draw.random() < 0.3:
        options["zero_point"] = False
    if options["layout"] == "gemv":
        options["group_size"] = 32
    if options["layout"] == "gemv_fast":
        options["group_size"] = 64
    if hidden % (options["group_size"] or 1) and options["layout"] == "gemm":
        options["group_size"] = 16
    return getattr(transformers, f"{kind}Config")(**sizes), options


def run(model, ids):
    """Logits, and the experts that each router chose, [B, T * k]."""
    chosen = []

    def note(module, args, out):
        experts = next(t for t in out if t.dtype == torch.int64) if isinstance(out, tuple) else None
        if experts is not None:
            chosen.append(experts.sort(-1).values.reshape(len(ids), -1))

    hooks = [m.register_forward_hook(note) for name, m in model.named_modules() if name.endswith(".gate")]
    with torch.no_grad():
        logits = model.eval()(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, chosen


@pytest.mark.parametrize("case", range(CASES))
def test_a_random_model(case, tmp_path, monkeypatch, load):
    draw = random.Random(case)
    config, options = random_config(draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case)
        model = transformers.AutoModelForCausalLM.from_config(config).float()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.ndim == 1:
                    tensor.add_(0.2 * torch.randn_like(tensor))
                elif "embed" not in name:
                    tensor.mul_(3)
        ids = torch.randint(3, len(LETTERS), (2, 9))
    stored = getattr(torch, options["dtype"])
    model.to(stored).save_pretrained(tmp_path / "dense")
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(tmp_path / "dense")

    blocks: list[nn.Module] = []
    real = search_module.quantize_block
    monkeypatch.setattr(search_module, "quantize_block", lambda b, *a, **k: blocks.append(b) or real(b, *a, **k))
    try:
        quantize(tmp_path / "dense", tmp_path / "out", **options)
    except Exception as error:
        if "does not fit linears of" not in str(error):
            raise
        pytest.skip(str(error))
    pseudo = load(tmp_path / "dense", dtype=torch.float32)
    decoder = Decoder.of(pseudo)
    for number, block in enumerate(blocks):
        decoder.blocks[number] = block
    wanted, chosen = run(pseudo, ids)
    got, found = run(load(tmp_path / "out", dtype=torch.float32), ids)
    tolerance = 2e-2 if options["layout"] == "gemv_fast" else 3e-3
    if options["layout"] == "gemv_fast":  # its zeros are rounded to float16, which may tip a router that was undecided
        same = torch.tensor(
            [all(torch.equal(a[i], b[i]) for a, b in zip(chosen, found, strict=True)) for i in range(len(ids))]
        )
        wanted, got = wanted[same], got[same]
        assert len(got)
    assert (got - wanted).norm() <= tolerance * wanted.norm(), (config, options)
