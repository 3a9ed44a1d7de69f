"""A fused model answers as the model that it was made from, whatever generate is asked to do."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


@pytest.fixture(params=[True, False], ids=["fast step", "own forward"])
def pair(request, pair):
    """Both ways to decode: through the fast step where its conditions hold, and through the model's own forward."""
    return lambda *args, **options: pair(*args, step=request.param, **options)


# What is joined in two layers: attention and MLP blocks.
FUSED = {
    "llama": (2, 2),
    "llama_bias": (2, 2),
    "llama_tied": (2, 2),
    "llama_mqa": (2, 2),
    "llama_mha": (2, 2),
    "llama3_rope": (2, 2),
    "yarn_rope": (2, 2),
    "dynamic_rope": (2, 2),
    "mistral": (2, 2),
    "qwen2": (2, 2),
    "qwen3": (2, 2),
    "gemma": (2, 2),
    "gemma2": (2, 2),
    "gemma3_text": (2, 2),
    "mixtral": (2, 0),
    "qwen3_moe": (2, 0),
    "qwen3_moe_dense_first": (2, 1),
    "starcoder2": (2, 0),
    "phi3": (0, 0),
    "falcon": (0, 0),
    "falcon_alibi": (0, 0),
    "mpt": (0, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_architectures(pair, prompt, tokens, name):
    plain, fused = pair(name)
    layers = fused.awq_fused.layers
    joined = [sum(len(sizes) > 1 for sizes in kind) for kind in zip(*_sizes(layers), strict=True)]
    assert tuple(joined) == FUSED[name]
    assert all(layer.qkv is not None for layer in layers)
    for inputs in (prompt(1, 20), prompt(3)):
        assert tokens(fused, inputs) == tokens(plain, inputs)
    inputs = prompt(2, 12)
    torch.testing.assert_close(fused(**inputs).logits, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def _sizes(layers):
    return [(layer.qkv_sizes, layer.gate_up_sizes) for layer in layers]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_attention_implementations(pair, prompt, tokens, name, attention):
    plain, fused = pair(name, attn_implementation=attention)
    assert fused.config._attn_implementation == attention
    assert tokens(fused, prompt(3)) == tokens(plain, prompt(3))


OPTIONS = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("asked", OPTIONS)
def test_ways_to_generate(pair, prompt, tokens, name, asked):
    inputs = prompt(1, 20) if asked == "prompt lookup" else prompt(2, 11)
    answers = []
    for model in pair(name):
        torch.manual_seed(3)
        answers.append(tokens(model, inputs, **OPTIONS[asked]))
    assert answers[0] == answers[1]


def test_assisted_decoding(pair, prompt, tokens):
    plain, fused = pair("llama")
    assistant, fused_assistant = pair("llama_mha")
    alone = tokens(plain, prompt(1, 9))
    assert tokens(fused, prompt(1, 9), assistant_model=assistant) == alone
    assert tokens(plain, prompt(1, 9), assistant_model=fused_assistant) == alone
    assert tokens(fused, prompt(1, 9), assistant_model=fused_assistant) == alone


def test_calls_in_a_row_and_changing_batches(pair, prompt, tokens):
    plain, fused = pair("qwen2")
    for batch, length in [(1, 5), (3, 9), (2, 30), (1, 1), (3, 9)]:
        inputs = prompt(batch, length)
        assert tokens(fused, inputs, 6) == tokens(plain, inputs, 6)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_turns_with_one_cache(pair, prompt, name):
    histories = []
    for model in pair(name):
        cache = DynamicCache(config=model.config)
        ids = prompt(1, 6)["input_ids"]
        for turn in range(3):
            ids = torch.cat([ids, prompt(1, 4, seed=turn)["input_ids"]], dim=1)
            ids = model.generate(
                ids, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        assert cache.get_seq_length() == ids.shape[1] - 1
        histories.append(ids.tolist())
    assert histories[0] == histories[1]


def test_a_static_cache_by_hand(pair, prompt):
    logits = []
    ids = prompt(1, 12)["input_ids"]
    for model in pair("llama"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in [(0, 5), (5, 6), (6, 12)]]
        logits.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1], pair("llama")[0](ids).logits, rtol=1e-3, atol=1e-4)


def test_embeddings_instead_of_ids(pair, prompt):
    answers = []
    for model in pair("llama"):
        embeds = model.get_input_embeddings()(prompt(2, 8)["input_ids"])
        answers.append(model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert answers[0].tolist() == answers[1].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair, prompt, dtype):
    plain, fused = pair("llama", dtype=dtype)
    a, b = (model(**prompt(2, 9)).logits.float() for model in (plain, fused))
    assert (a - b).norm() / a.norm() < (0.02 if dtype == torch.bfloat16 else 0.003)


LIMITS = [
    ({"max_new_tokens": 88}, "the prompt has 9 tokens and max_new_tokens is 88: that makes 97"),
    ({"max_new_tokens": None, "max_length": 97}, "max_length is 97: that makes 97"),
    ({"max_new_tokens": 88, "max_length": 20}, "max_new_tokens is 88"),
]


@pytest.mark.parametrize(("options", "said"), LIMITS)
def test_too_long_is_refused_before_anything_runs(pair, prompt, tokens, monkeypatch, options, said):
    _, fused = pair("llama")
    assert tokens(fused, prompt(1, 9), 87)  # fuse_max_seq_len is 96
    monkeypatch.setattr(type(fused), "forward", None)
    with pytest.raises(ValueError, match=said) as error:
        tokens(fused, prompt(1, 9), **options)
    assert "more than fuse_max_seq_len=96; pass a smaller max_new_tokens" in str(error.value)


def test_too_long_by_default_or_by_config(pair, prompt, fresh):
    _, fused = fresh("llama")
    with pytest.raises(ValueError, match=r"has 80 tokens and 20 more are generated by default"):
        fused.generate(prompt(1, 80)["input_ids"])
    fused.generation_config.max_new_tokens = 90
    with pytest.raises(ValueError, match=r"max_new_tokens is 90"):
        fused.generate(prompt(1, 9)["input_ids"])
    long_ago = {"input_ids": prompt(1, 2)["input_ids"], "attention_mask": torch.ones(1, 95, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"has 95 tokens and max_new_tokens is 2"):
        fused.generate(**long_ago, max_new_tokens=2)
