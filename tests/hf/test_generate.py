"""generate() on an AWQ model gives the tokens of the dense model with the same weights."""

from __future__ import annotations

import pytest
import torch

from awq_core.testing.tiny import ARCHITECTURES

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def pair(checkpoint, load, dense):
    """An AWQ model and its dense oracle, both in float32."""

    def make(architecture):
        folder = checkpoint(architecture)
        return load(folder, dtype=torch.float32), load(dense(folder), dtype=torch.float32)

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens(pair, ids, architecture):
    model, oracle = pair(architecture)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, **NEW)
    assert out.shape == (2, 13)
    assert torch.equal(out, oracle.generate(ids, attention_mask=mask, **NEW))
    assert torch.equal(out, model.generate(ids, attention_mask=mask, **NEW))  # nothing is kept between calls


@pytest.mark.parametrize("architecture", ["llama", "mistral", "mixtral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padding(backend, pair, ids, architecture, cache):
    model, oracle = pair(architecture)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :3], mask[1, :3] = 0, 0
    options = NEW | ({} if cache == "dynamic" else {"cache_implementation": cache})
    out = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(out, oracle.generate(padded, attention_mask=mask, **NEW))
    alone = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], **NEW)
    assert torch.equal(out[1, 7:], alone[0, 4:])


def test_beams_and_another_batch_size(backend, pair, ids):
    model, oracle = pair("llama")
    options = NEW | {"num_beams": 3}
    for batch in (ids, ids[:1], ids):
        mask = torch.ones_like(batch)
        wanted = oracle.generate(batch, attention_mask=mask, **options)
        assert torch.equal(model.generate(batch, attention_mask=mask, **options), wanted)
