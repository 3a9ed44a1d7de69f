"""The fast decode step on a GPU: captured graphs give what the unfused model gives, within its own noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

from awq_core.bench.models import named_config, random_awq_model
from awq_core.hf.decode import ENGINE, why_not

LIMIT = {torch.float16: 2e-2, torch.bfloat16: 8e-2}
PROMPT, TOTAL = 70, 90


def models(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The same two layers unfused and fused."""
    config = named_config(name, 2)
    config.eos_token_id, config.pad_token_id = None, 0
    made = [random_awq_model(config, device="cuda", dtype=dtype, fuse_max_seq_len=limit) for limit in (None, 700)]
    return made[0], made[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mistral-7b", "qwen2.5-7b", "tinyllama"])
@torch.no_grad()
def test_logits_are_those_of_the_unfused_model(name: str, dtype: torch.dtype) -> None:
    plain, fused = models(name, dtype)
    assert why_not(fused) is None
    engine = fused.__dict__[ENGINE]
    for batch, pads in ((1, None), (3, [0, 9, 30]), (8, None), (1, None)):
        ids = torch.randint(10, 30000, (batch, TOTAL), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        left = torch.tensor(pads or [0] * batch, device="cuda")
        mask = (torch.arange(TOTAL, device="cuda") >= left[:, None]).long()
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        wanted = plain(ids, **inputs).logits[:, PROMPT - 1 :].float()
        with engine.session(batch, TOTAL) as session:
            session.start(0, left if pads else None)
            logits = session.prefill(ids[:, :PROMPT])
            if logits is None:
                from awq_core.hf.decode import StaticMemory

                begun = {key: value[:, :PROMPT] for key, value in inputs.items()}
                logits = fused(ids[:, :PROMPT], past_key_values=StaticMemory(session), **begun).logits[:, -1]
            got = [logits.float().clone()]
            for t in range(PROMPT, TOTAL):
                got.append(session.logits(ids[:, t]).float().clone())
        error = (torch.stack(got, 1) - wanted).norm() / wanted.norm()
        assert error < LIMIT[dtype], (batch, pads, float(error))


def test_greedy_on_the_device_is_greedy_step_by_step() -> None:
    _, fused = models("tinyllama", torch.float16)
    ids = torch.randint(10, 30000, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for batch in (1, 2):
        inputs = {"input_ids": ids[:batch], "attention_mask": mask[:batch]}
        whole = fused.generate(**inputs, max_new_tokens=60, do_sample=False)
        # a processor that changes nothing, so that the choice is made outside of the graph
        stepwise = fused.generate(
            **inputs, max_new_tokens=60, do_sample=False, logits_processor=[lambda ids, scores: scores]
        )
        assert whole.tolist() == stepwise.tolist()
        end = int(whole[0, 55])
        ended = fused.generate(**inputs, max_new_tokens=60, do_sample=False, eos_token_id=end, pad_token_id=0)
        first = whole[0, 40:].tolist().index(end) + 41
        assert ended[0, :first].tolist() == whole[0, :first].tolist()
        assert not ended[0, first:].any()
        if batch == 1:
            assert ended.shape[1] == first


def test_graphs_survive_other_batches_and_growing_memory() -> None:
    _, fused = models("tinyllama", torch.float16)
    ids = torch.randint(10, 30000, (4, 30), device="cuda")
    first = fused.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=20, do_sample=False)
    for batch, new in ((2, 10), (4, 600), (3, 5)):
        fused.generate(ids[:batch], attention_mask=torch.ones_like(ids[:batch]), max_new_tokens=new, do_sample=False)
    again = fused.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=20, do_sample=False)
    assert again.tolist() == first.tolist()


@torch.no_grad()
def test_prompts_filled_up_for_a_graph_are_those_of_the_model() -> None:
    plain, fused = models("mistral-7b", torch.float16)
    engine = fused.__dict__[ENGINE]
    for batch in (1, 2):
        with engine.session(batch, 300) as session:
            seen: dict[int, torch.Tensor] = {}
            for length in (9, 70, 128, 70, 9, 128, 200, 70):
                ids = torch.randint(
                    10, 30000, (batch, length), device="cuda", generator=torch.Generator("cuda").manual_seed(1)
                )
                session.start(0, None)
                logits = session.prefill(ids)
                assert logits is not None
                wanted = plain(ids).logits[:, -1].float()
                assert (logits.float() - wanted).norm() / wanted.norm() < LIMIT[torch.float16], (batch, length)
                assert torch.equal(seen.setdefault(length, logits), logits), "the graph gives other bits"
                after = session.logits(ids[:, 0]).float()
                wanted = plain(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1].float()
                assert (after - wanted).norm() / wanted.norm() < LIMIT[torch.float16], (batch, length)
