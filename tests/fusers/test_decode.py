"""The fast decode step on the CPU: what ``generate`` gives with it is what it gives without it, token by token."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers

from awq_core.hf.decode import ENGINE, attach, detach, why_not
from awq_fusers import decode
from awq_fusers.decode.session import Session

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 5,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("Llama", {}),
    "mha": ("Llama", {"num_key_value_heads": 4}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "yarn rope": ("Llama", {"rope_parameters": YARN}),
    "mistral, sliding": ("Mistral", {"sliding_window": 8}),
    "mistral, full": ("Mistral", {"sliding_window": None}),
    "qwen2, some layers sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3, q and k norms": ("Qwen3", {"head_dim": 32}),
    "phi3, packed and sliding": ("Phi3", {"sliding_window": 8}),
    "phi3, partial rope": ("Phi3", {"rope_parameters": PARTIAL}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2, soft caps": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8, "layer_types": LAYERS, "query_pre_attn_scalar": 32}),
}


def make(family: str = "Llama", **sizes: Any) -> Any:
    """A dense model in float32 whose tokens vary."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(SIZES | sizes))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.data.mul_(6)
            elif name.endswith("bias"):
                weight.data.normal_()
    return model


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Three prompts, two of them padded at the left."""
    ids = torch.randint(6, 96, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of each step that was taken."""
    taken: list[int] = []
    logits = Session.logits

    def counted(self: Session, tokens: torch.Tensor) -> torch.Tensor:
        taken.append(len(tokens))
        return logits(self, tokens)

    monkeypatch.setattr(Session, "logits", counted)
    return taken


def generate(model: Any, inputs: dict[str, torch.Tensor], seed: int = 0, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(**inputs, **options)
        return out, torch.get_rng_state()


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 24},
    "sampling": {"max_new_tokens": 12, "do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"max_new_tokens": 8, "num_beams": 3},
    "processors": {"max_new_tokens": 12, "repetition_penalty": 1.3, "min_new_tokens": 10},
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_plain_model(name: str, prompts, steps) -> None:
    family, sizes = MODELS[name]
    model = make(family, **sizes)
    one = {"input_ids": prompts["input_ids"][1:2]}
    plain = {mode: [generate(model, inputs, **o) for inputs in (prompts, one)] for mode, o in MODES.items()}
    assert steps == []
    decode.install(model)
    assert why_not(model) is None
    for mode, options in MODES.items():
        for inputs, (ids, state) in zip((prompts, one), plain[mode], strict=True):
            del steps[:]
            fast, after = generate(model, inputs, **options)
            assert fast.tolist() == ids.tolist(), mode
            assert len(steps) >= ids.shape[1] - 12 - 2, mode
            assert torch.equal(after, state), f"{mode}: the random state differs"


def test_the_end_of_sequences_and_their_padding(prompts) -> None:
    model = make()
    free, _ = generate(model, prompts, max_new_tokens=24, eos_token_id=None)
    ends = [int(free[0, 14]), int(free[1, 17])]  # rows end at different times, the third perhaps never
    for options in ({"eos_token_id": ends}, {"eos_token_id": ends, "pad_token_id": ends[0]}, {"eos_token_id": None}):
        detach(model)
        plain, _ = generate(model, prompts, max_new_tokens=24, **options)
        decode.install(model)
        fast, _ = generate(model, prompts, max_new_tokens=24, **options)
        assert fast.tolist() == plain.tolist()
    assert plain.shape[1] == 36


def test_calls_in_a_row_and_changing_batches(prompts, steps) -> None:
    model, fused = make(), make()
    decode.install(fused)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for rows, new in ((slice(0, 1), 5), (slice(0, 3), 9), (slice(1, 2), 30), (slice(0, 2), 4), (slice(0, 3), 200)):
        inputs = {"input_ids": ids[rows], "attention_mask": mask[rows]}
        plain, _ = generate(model, inputs, max_new_tokens=new, eos_token_id=None)
        fast, _ = generate(fused, inputs, max_new_tokens=new, eos_token_id=None)
        assert fast.tolist() == plain.tolist()
    assert set(steps) == {1, 2, 3}
    assert fused.__dict__[ENGINE].storage.batch == 3


def test_memory_grows_to_what_a_call_needs() -> None:
    model = make(max_position_embeddings=2048)
    decode.install(model)
    ids = torch.arange(6, 20)[None]
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=4)
    storage = model.__dict__[ENGINE].storage
    assert storage.capacity == 512
    model.generate(ids, max_new_tokens=20)
    assert model.__dict__[ENGINE].storage is storage
    model.generate(ids, max_new_tokens=560, eos_token_id=int(model.generate(ids, max_new_tokens=1)[0, -1]))
    assert model.__dict__[ENGINE].storage.capacity == 640


def test_what_a_user_keeps_is_his_own(prompts, steps) -> None:
    model, fused = make("Gemma2", sliding_window=8, head_dim=16), make("Gemma2", sliding_window=8, head_dim=16)
    decode.install(fused)
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    plain, _ = generate(model, prompts, **options)
    fast, _ = generate(fused, prompts, **options)
    assert len(steps) == 9
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    generate(fused, prompts, max_new_tokens=15)  # writes into the same memory
    assert type(fast.past_key_values) is transformers.DynamicCache
    for mine, theirs in zip(fast.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)
    more = torch.cat([plain.sequences, torch.full((3, 4), 7)], 1)
    mask = torch.cat([prompts["attention_mask"], torch.ones(3, 14, dtype=torch.long)], 1)
    following = {"input_ids": more, "attention_mask": mask}
    second, _ = generate(model, following, max_new_tokens=5, past_key_values=plain.past_key_values)
    second_fast, _ = generate(fused, following, max_new_tokens=5, past_key_values=fast.past_key_values)
    assert second_fast.tolist() == second.tolist()


class Told(transformers.generation.BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


class Stops(transformers.StoppingCriteria):
    """Each row for itself, where a token is a multiple of 7."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 7 == 0


def test_streamers_and_criteria_of_the_user(prompts, steps) -> None:
    model, fused = make(), make()
    decode.install(fused)
    for options in ({}, {"eos_token_id": None}, {"do_sample": True}):
        told = []
        for one in (model, fused):
            streamer = Told()
            criteria = transformers.StoppingCriteriaList([Stops()])
            out, _ = generate(one, prompts, max_new_tokens=20, streamer=streamer, stopping_criteria=criteria, **options)
            told.append((streamer.heard, out.tolist()))
        assert told[0] == told[1]
    assert steps


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"use_cache": False}, False),
        ({"cache_implementation": "static"}, False),
        ({"prefill_chunk_size": 4}, False),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, False),
        ({"prompt_lookup_num_tokens": 2}, False),
        ({"max_time": 100.0}, True),
        ({"renormalize_logits": True, "do_sample": True}, True),
    ],
)
def test_other_ways_to_generate_run_as_before(options: dict[str, Any], taken: bool, prompts, steps) -> None:
    model, fused = make(), make()
    decode.install(fused)
    inputs = {name: tensor[1:2] for name, tensor in prompts.items()}
    found = [generate(one, inputs, max_new_tokens=8, **options)[0] for one in (model, fused)]
    plain, fast = (out if isinstance(out, torch.Tensor) else out.sequences for out in found)
    assert fast.tolist() == plain.tolist()
    assert bool(steps) is taken


def test_masks_with_holes_and_embeddings_run_as_before(prompts, steps) -> None:
    model, fused = make(), make()
    decode.install(fused)
    ids, mask = prompts["input_ids"], prompts["attention_mask"].clone()
    mask[1, 4] = 0
    for inputs in (
        {"input_ids": ids, "attention_mask": mask},
        {"inputs_embeds": model.get_input_embeddings()(ids).detach(), "attention_mask": prompts["attention_mask"]},
    ):
        plain, fast = (generate(one, inputs, max_new_tokens=8)[0] for one in (model, fused))
        assert fast.tolist() == plain.tolist()
    assert steps == []


def test_a_change_of_the_model_is_seen(prompts, steps) -> None:
    model = make()
    decode.install(model)
    generate(model, prompts, max_new_tokens=4)
    assert steps
    for tensor in model.parameters():
        tensor.data = -tensor.data  # other memory, other weights
    fast, _ = generate(model, prompts, max_new_tokens=8)
    seen: list[Any] = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(args))
    assert "layers.1.mlp has a forward hook" in str(why_not(model))
    del steps[:]
    plain, _ = generate(model, prompts, max_new_tokens=8)
    assert steps == []
    assert len(seen) == 8
    assert fast.tolist() == plain.tolist()
    hook.remove()
    assert why_not(model) is None


def test_hooks_that_transformers_leaves_behind_do_no_harm(prompts) -> None:
    model = make()
    decode.install(model)
    model(prompts["input_ids"], output_hidden_states=True)
    assert why_not(model) is None


@pytest.mark.parametrize(
    ("family", "sizes", "reason"),
    [
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic' changes with",
        ),
        ("Llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("Mixtral", {"num_local_experts": 2}, "MixtralForCausalLM is not a causal language model of Gemma, Gemma2"),
    ],
)
def test_what_has_no_step_says_why_and_runs(family, sizes, reason, prompts, steps) -> None:
    model = make(family, **sizes)
    plain, _ = generate(model, prompts, max_new_tokens=4)
    decode.install(model)
    assert reason in str(why_not(model))
    assert generate(model, prompts, max_new_tokens=4)[0].tolist() == plain.tolist()
    assert steps == []


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Mine(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    model = Mine(transformers.LlamaConfig(**SIZES))
    decode.install(model)
    assert type(model) is Mine
    assert "Mine is not" in str(why_not(model))


def test_the_class_and_its_undoing(tmp_path, prompts) -> None:
    model = make()
    kind = type(model)
    plain, _ = generate(model, prompts, max_new_tokens=4)
    decode.install(model)
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [kind.__name__]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is kind
        assert ENGINE not in copied.__dict__
        assert generate(copied, prompts, max_new_tokens=4)[0].tolist() == plain.tolist()
    decode.install(model)  # again
    generate(model, prompts, max_new_tokens=4)
    decode.uninstall(model)
    assert type(model) is kind
    assert ENGINE not in model.__dict__
    assert why_not(model) == "it was not asked for"
    decode.uninstall(model)


def test_a_second_generation_at_the_same_time_runs_plainly(prompts, steps) -> None:
    model = make()
    plain, _ = generate(model, prompts, max_new_tokens=5)
    decode.install(model)
    inner: list[Any] = []

    class Nested(Told):
        def put(self, value: torch.Tensor) -> None:
            if len(self.heard) == 2:
                inner.append(model.generate(**prompts, max_new_tokens=5).tolist())
            super().put(value)

    assert model.generate(**prompts, max_new_tokens=5, streamer=Nested()).tolist() == plain.tolist()
    assert inner == [plain.tolist()]
    assert len(steps) == 4


def test_no_memory_is_said_and_the_model_runs(prompts, monkeypatch, caplog) -> None:
    model = make()
    plain, _ = generate(model, prompts, max_new_tokens=5)
    decode.install(model)

    def none_left(*args: Any) -> None:
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr("awq_fusers.decode.engine.Storage", none_left)
    assert generate(model, prompts, max_new_tokens=5)[0].tolist() == plain.tolist()
    assert "without the fast decode step because there is no memory for a cache of 3 x 17 tokens" in caplog.text


def test_a_session_does_not_write_past_its_end() -> None:
    model = make()
    engine = decode.engine_for(model)
    with engine.session(1, 10) as session:
        assert session is not None
        session.start(session.capacity)
        with pytest.raises(IndexError, match="no room"):
            session.logits(torch.tensor([1]))


def test_attach_is_for_engines_made_for_the_model(prompts, steps) -> None:
    model = make()
    attach(model, decode.engine_for(model))
    generate(model, prompts, max_new_tokens=3)
    assert steps
