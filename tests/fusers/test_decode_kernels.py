"""The decode step's Triton kernels without a GPU: right in Triton's interpreter, and compiled for GPUs.

The interpreter must be chosen before Triton is imported, hence the processes.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

ATTENTION = """
import itertools, math
import torch
from awq_fusers.decode import launch
from awq_fusers.decode.model import Attention, Norm
from awq_fusers.decode.step import norm_op

def turned(x, cos, sin, positions):
    size = cos.shape[1]
    c, s = cos[positions][:, None].double(), sin[positions][:, None].double()
    part, rest = x[..., :size], x[..., size:]
    half = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
    return torch.cat((part * c + half * s, rest), -1)

def exact(a, qkv, cache, cos, sin, length, pads):
    "The same in float64: the heads' outputs [B, heads * D], and the new keys and values [B, kv_heads, D]."
    batch = qkv.shape[0]
    heads = qkv.double().view(batch, -1, a.head_dim)
    q, k, v = heads.split([a.heads, a.kv_heads, a.kv_heads], 1)
    if a.q_norm is not None:
        q, k = norm_op(a.q_norm)(q.float()).double(), norm_op(a.k_norm)(k.float()).double()
    positions = length - pads
    q, k = turned(q, cos, sin, positions), turned(k, cos, sin, positions)
    outs = []
    for b in range(batch):
        first = max(int(pads[b]), 0 if a.window is None else length + 1 - a.window)
        keys = torch.cat((cache[b, : a.kv_heads, first:length].double(), k[b][:, None]), 1)
        values = torch.cat((cache[b, a.kv_heads :, first:length].double(), v[b][:, None]), 1)
        group = a.heads // a.kv_heads
        scores = torch.einsum("hd,hkd->hk", q[b], keys.repeat_interleave(group, 0)) * a.scaling
        if a.softcap:
            scores = torch.tanh(scores / a.softcap) * a.softcap
        outs.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), values.repeat_interleave(group, 0)).flatten())
    return torch.stack(outs), k, v

launch.PROGRAMS = 6
cases = [
    # heads, kv_heads, D, R, window, softcap, norm, lengths
    (4, 2, 32, 32, None, None, None, (0, 1, 31, 32, 33, 150)),
    (3, 1, 16, 8, 40, None, None, (0, 39, 40, 140)),
    (2, 2, 24, 24, None, 5.0, "plain", (5, 100)),
    (8, 1, 16, 16, 20, None, "offset", (70,)),
]
checked = 0
for heads, kv_heads, size, rotary, window, softcap, norm, lengths in cases:
    for dtype, pads in itertools.product((torch.float32, torch.float16), (None, "some")):
        g = torch.Generator().manual_seed(heads + size)
        batch, capacity = 2, 192
        cos, sin = (torch.rand(capacity, rotary, generator=g).to(dtype) for _ in "cs")
        drawn = [torch.rand(size, generator=g).to(dtype) for _ in "qk"]
        weights = [Norm(weight, 1e-5, norm == "offset") if norm else None for weight in drawn]
        a = Attention((), None, heads, kv_heads, size, 0.3, window, softcap, *weights)
        cache = torch.randn(batch, 2 * kv_heads, capacity, size, generator=g).to(dtype)
        at, padded = torch.zeros(1, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
        scratch = {}
        attend = launch.Attend(a, cache, cos, sin, at, padded, scratch)
        for length in lengths:
            at.fill_(length)
            padded.copy_(torch.tensor([0, min(length, 9)]) if pads else torch.zeros(2))
            qkv = torch.randn(batch, (heads + 2 * kv_heads) * size, generator=g).to(dtype)
            cache[:, :, length:] = float("nan")  # what is not cached yet must not be read
            before, asked = cache.clone(), qkv.clone()
            wanted, k, v = exact(a, qkv, cache, cos, sin, length, padded.long())
            got = attend(qkv)
            limit = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(got.double(), wanted, **limit)
            torch.testing.assert_close(cache[:, :kv_heads, length].double(), k, **limit)
            assert torch.equal(cache[:, kv_heads:, length].double(), v)
            cache[:, :, length] = before[:, :, length]
            assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7)) and torch.equal(qkv, asked)
            assert all(not counters.any() for *_, counters in scratch.values())
            cache = attend.cache.copy_(torch.randn(cache.shape, generator=g))
            checked += 1
print(checked, "steps")
"""

OTHERS = """
import torch
import torch.nn.functional as F
from awq_fusers.decode import launch
from awq_fusers.decode.model import Attention, Norm
from awq_fusers.decode.step import norm_op

g = torch.Generator().manual_seed(0)
for dtype, size, offset, limit in (
    (torch.float16, 72, False, 1e-2),
    (torch.float16, 64, True, 1e-2),
    (torch.bfloat16, 576, False, 6e-2),
):
    one, two = (Norm(torch.randn(size, generator=g).to(dtype), 1e-5, offset) for _ in "ab")
    x, y = (torch.randn(3, size, generator=g).to(dtype) for _ in "xy")
    for add, after in ((None, None), (y, None), (y, two)):
        residual, out = x.clone(), torch.full_like(x, float("nan"))
        launch.add_norm(add, residual, one, out, after)
        wanted = x if add is None else x + (add if after is None else norm_op(after)(add))
        torch.testing.assert_close(residual, wanted, rtol=limit, atol=limit)
        torch.testing.assert_close(out, norm_op(one)(wanted), rtol=limit, atol=limit)
for name, function in (
    ("silu", F.silu),
    ("gelu", F.gelu),
    ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh")),
):
    x = 3 * torch.randn(2, 2 * 700, generator=g)
    torch.testing.assert_close(launch.gated(x, name), function(x[:, :700]) * x[:, 700:], rtol=1e-5, atol=1e-5)

# the choice: the first of equal logits, padding after the end, and the length
length = torch.full((1,), 3, dtype=torch.int32)
pick = launch.Pick(3, 8, length)
launch.PICK_BLOCK = 16
logits = torch.randn(3, 50, generator=g).half()
logits[0, 7] = logits[0, 33] = 9.0
logits[1, 48] = 9.0
logits[2, 20] = 9.0
pick.start(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 0]), torch.tensor([48, 2]), 0)
pick(logits)
assert pick.tokens.tolist() == [7, 48, 0]
assert pick.ids[:, 4].tolist() == [7, 48, 0]
assert (pick.open.tolist(), pick.left.tolist(), length.tolist()) == ([1, 0, 0], [1], [4])
assert not pick.counters.any()
pick(logits)
assert pick.ids[:, 4:6].tolist() == [[7, 7], [48, 0], [0, 0]]
assert (pick.left.tolist(), length.tolist()) == ([1], [5])

# prefill: rotated queries, and keys and values in the cache
a = Attention((), None, 4, 2, 16, 0.25)
cos, sin = torch.rand(32, 16, generator=g), torch.rand(32, 16, generator=g)
cache, pads = torch.full((2, 4, 32, 16), float("nan")), torch.zeros(2, dtype=torch.int32)
qkv = torch.randn(2 * 5, 8 * 16, generator=g)
q = launch.Attend(a, cache, cos, sin, length, pads, {}).turn_and_keep(qkv, 5)
heads = qkv.view(2, 5, 8, 16).transpose(1, 2)
swapped = torch.cat((-heads[..., 8:], heads[..., :8]), -1)
rotated = heads * cos[:5] + swapped * sin[:5]
torch.testing.assert_close(q, rotated[:, :4])
torch.testing.assert_close(cache[:, :2, :5], rotated[:, 4:6])
assert torch.equal(cache[:, 2:, :5], heads[:, 6:])
assert cache[:, :, 5:].isnan().all()
print("done")
"""

WHOLE = """
import gc
import weakref
import torch
import transformers
from awq_fusers import decode
from awq_fusers.decode import graph, launch, session

launch.PROGRAMS = 4
session.make_step = lambda decoder, storage: graph.GraphedStep(decoder, storage, capture=False)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None, head_dim=16)
for family, more in (("Qwen3", {}), ("Gemma2", {"sliding_window": 6})):
    torch.manual_seed(0)
    config = getattr(transformers, family + "Config")(**sizes, **more)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        weight.data.mul_(6 if weight.dim() > 1 else 1)
    ids = torch.randint(1, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    class Heard(transformers.generation.BaseStreamer):
        def __init__(self): self.all = []
        def put(self, value): self.all.append(value.tolist())
        def end(self): self.all.append("end")
    runs = [
        dict(input_ids=ids, max_new_tokens=5),
        dict(input_ids=ids * mask, attention_mask=mask, max_new_tokens=5),
        dict(input_ids=ids[:1], max_new_tokens=3, do_sample=True),
    ]
    def go():
        out = []
        for options in runs:
            torch.manual_seed(3)
            streamer = Heard()
            out.append((model.generate(**options, streamer=streamer).tolist(), streamer.all))
        return out
    plain = go()
    first = plain[0][0][0]
    runs.append(runs[0] | dict(eos_token_id=[first[-3], plain[0][0][1][-3]], max_new_tokens=6))
    plain = go()
    decode.install(model)
    assert go() == plain, family
    (one, many) = (model.__dict__["_awq_decode"].sessions[b] for b in (1, 2))
    assert set(many.step.replays) == {"greedy"} and set(one.step.replays) == {"advance"}
    gc.collect()
    gc.disable()
    one.step.prompts[16] = one.step._prompt(1, 16)
    old = weakref.ref(one.step)
    del one, many
    model.__dict__["_awq_decode"].release()
    assert old() is None, "a step that is let go keeps its memory until Python looks for cycles"
    gc.enable()
print("done")
"""

NORMED = """
import torch
import transformers
from awq_fusers import decode
from awq_fusers.decode import gpu_step, graph, launch, linears, session
from awq_gemv.launch import _norm

launch.PROGRAMS = 4
seen = []

def normed_linears(decoder):
    def of(function):
        def call(row):
            seen.append(row.plus is not None)
            return function(_norm(row))
        return call
    return [(of(linears.joined(a.attention.qkv, 1)), of(gpu_step.gated_up(a.mlp, 1))) for a in decoder.layers]

gpu_step.normed_linears = normed_linears
session.make_step = lambda decoder, storage: graph.GraphedStep(decoder, storage, capture=False)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=None)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**sizes), dtype=torch.float32).eval()
for weight in model.parameters():
    weight.data.mul_(6 if weight.dim() > 1 else 1)
ids = torch.randint(1, 64, (1, 7))
plain = model.generate(ids, max_new_tokens=6, do_sample=False)
decode.install(model)
assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
assert seen[:6] == [False] + [True] * 5 and len(seen) % 6 == 0, seen
print("done")
"""

COMPILE = """
import sys
from awq_fusers.decode.sources import sources
from awq_core.spec import Device
from awq_core.testing.compile import compile_one

count = 0
for name in sys.argv[1:]:
    device = Device.parse(name)
    for source in sources(overlap=device.arch in ("sm90", "sm100", "sm120")):
        done = compile_one("decode", device, source)
        assert not done.error, (name, done)
        count += 1
print(count, "compiled")
"""


def test_attention_is_right_in_the_interpreter(in_process) -> None:
    assert "52 steps" in in_process(ATTENTION, interpret=True)


def test_the_other_kernels_are_right_in_the_interpreter(in_process) -> None:
    assert "done" in in_process(OTHERS, interpret=True)


def test_generate_over_the_kernels_in_the_interpreter(in_process) -> None:
    assert "done" in in_process(WHOLE, interpret=True)


def test_linears_that_take_the_norm_in(in_process) -> None:
    assert "done" in in_process(NORMED, interpret=True)


@pytest.mark.parametrize("arch", ["cuda:sm80", "cuda:sm90", "hip:gfx942"])
def test_the_kernels_compile(in_process, arch: str) -> None:
    assert "compiled" in in_process(COMPILE, arch, interpret=False)
