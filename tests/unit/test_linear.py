"""AwqLinear: shapes, numerics, gradients, compilation, moving, saving and copying, with and without repacking."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from awq_core import LayoutError, NoKernelError
from awq_core.layouts import checkpoint_layout, dequantize
from awq_core.linear import AwqLinear
from awq_core.quantization.rtn import quantize_weight

K, N, G = 128, 96, 32
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def make(layout: str = "gemm", bias: bool = True, dtype: torch.dtype = torch.float32, k: int = K, n: int = N):
    """A linear, not yet bound, with the state dict that it was loaded from and its dense weight [N, K] in float32."""
    generator = torch.Generator().manual_seed(0)
    codes = quantize_weight(torch.randn(n, k, generator=generator), G)
    state = checkpoint_layout(layout).pack(codes)
    if bias:
        state["bias"] = torch.randn(n, generator=generator).to(dtype)
    linear = AwqLinear(k, n, G, layout, bias=bias, dtype=dtype)
    linear.load_state_dict(state)
    stored = checkpoint_layout(layout).unpack(state, k, n, G)
    return linear, state, dequantize(stored, torch.float32).T


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[got.dtype] * wanted.abs().max(), rtol=0)


def assert_same_state(linear: AwqLinear, state: dict[str, torch.Tensor]) -> None:
    found = linear.state_dict()
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["gemm", "gemv", "gemv_fast", "llm_awq"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numerics(backend, layout, dtype):
    linear, state, weight = make(layout, dtype=dtype)
    x = inputs(3, K, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert_close(y, x.float() @ weight.T + state["bias"].float())
    assert_same_state(linear, state)


@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)], ids=str)
def test_shapes(backend, shape):
    linear, state, weight = make()
    y = linear(inputs(*shape))
    assert y.shape == (*shape[:-1], N)
    torch.testing.assert_close(y, inputs(*shape) @ weight.T + state["bias"], atol=1e-4, rtol=1e-4)


def test_inputs_that_are_not_contiguous(backend):
    linear, _, _ = make()
    x = inputs(K, 6).T
    assert not x.is_contiguous()
    torch.testing.assert_close(linear(x), linear(x.contiguous()))
    wide = inputs(4, 2 * K)[:, ::2]
    torch.testing.assert_close(linear(wide), linear(wide.contiguous()))
    expanded = inputs(1, K).expand(3, K)
    torch.testing.assert_close(linear(expanded), linear(expanded.contiguous()))


@pytest.mark.parametrize("shape", [(3, K - 1), (K + 8,), ()], ids=str)
def test_a_wrong_last_dimension_is_an_error(shape):
    linear, _, _ = make()
    with pytest.raises(ValueError, match=rf"AwqLinear wants \[\.\.\., {K}\], got"):
        linear(torch.zeros(shape))


def test_wrong_group():
    with pytest.raises(LayoutError, match="group_size 48 does not divide in_features 128"):
        AwqLinear(128, 96, 48)


def test_group_of_all_inputs():
    linear = AwqLinear(K, N, -1)
    assert linear.spec.group_size == K
    assert linear.scales.shape == (1, N)


def test_the_first_forward_binds(backend):
    linear, _, _ = make()
    assert not linear.plans
    assert "unbound" in repr(linear)
    linear(inputs(1, K))
    assert "M 1" in repr(linear)
    assert linear.spec.dtype == "float32"


def test_another_dtype_binds_anew(backend):
    linear, state, weight = make(bias=False)
    assert linear(inputs(2, K)).dtype == torch.float32
    y = linear(inputs(2, K).bfloat16())
    assert y.dtype == torch.bfloat16
    assert linear.spec.dtype == "bfloat16"
    assert_close(y, inputs(2, K).bfloat16().float() @ weight.T)
    assert_same_state(linear, state)


def test_an_integer_input_is_refused_and_leaves_the_linear_usable(backend):
    linear, state, _ = make()
    linear.bind()
    with pytest.raises(NoKernelError, match="int64"):
        linear(torch.ones(2, K, dtype=torch.int64))
    assert linear.dtype == torch.float32
    assert linear(inputs(2, K)).dtype == torch.float32
    assert_same_state(linear, state)


def test_autocast(backend):
    linear, state, weight = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(inputs(2, K))
    assert y.dtype == torch.bfloat16
    assert_close(y, inputs(2, K) @ weight.T + state["bias"])
    assert linear(inputs(2, K)).dtype == torch.float32


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradient(backend, mode):
    linear, state, weight = make()
    with mode():
        y = linear(inputs(2, K).requires_grad_())
    assert not y.requires_grad
    torch.testing.assert_close(y, inputs(2, K) @ weight.T + state["bias"], atol=1e-4, rtol=1e-4)
    linear(inputs(2, K).requires_grad_()).sum().backward()  # also where inference mode has bound it


@pytest.mark.parametrize("rows", [1, 9])
def test_backward_is_that_of_the_dense_linear(backend, rows):
    linear, state, weight = make()
    dense = nn.Linear(K, N)
    dense.load_state_dict({"weight": weight, "bias": state["bias"]})
    ours, theirs = inputs(2, rows, K).requires_grad_(), inputs(2, rows, K).requires_grad_()
    mask = inputs(2, rows, N)
    (linear(ours) * mask).sum().backward()
    (dense(theirs) * mask).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(linear.bias.grad, dense.bias.grad, atol=1e-4, rtol=1e-4)
    assert linear.qweight is None or linear.qweight.grad is None


def test_gradient_to_the_bias_alone():
    linear, _, _ = make()
    linear(inputs(4, K)).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full((N,), 4.0))


def test_no_gradient_without_need():
    linear, _, _ = make(bias=False)
    assert not linear(inputs(2, K)).requires_grad


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_a_break(backend, compiler):
    torch._dynamo.reset()
    linear, _, _ = make()
    linear.bind()
    compiled = torch.compile(linear, fullgraph=True, backend=compiler)
    for rows in (1, 3, 9):
        torch.testing.assert_close(compiled(inputs(rows, K)), linear(inputs(rows, K)))
    x = inputs(2, K).requires_grad_()
    compiled(x).sum().backward()
    y = inputs(2, K).requires_grad_()
    linear(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("rows", [1, 7])
def test_opcheck(backend, rows):
    linear, _, _ = make()
    linear.bind()
    state = linear.weight_state
    parts = [tensor.detach() for tensor in state.tensors().values()]
    x = inputs(rows, K).requires_grad_()
    bias = linear.bias.detach().clone().requires_grad_()
    torch.library.opcheck(torch.ops.awq_core.linear, (x, parts, bias, state.key))
    torch.library.opcheck(torch.ops.awq_core.linear, (x, parts, None, state.key))
    torch.library.opcheck(torch.ops.awq_core.linear_backward, (inputs(rows, N), parts, state.key))


def test_casting_leaves_codes_and_scales_alone(backend):
    linear, state, _ = make()
    linear.bind()
    linear.to(torch.bfloat16)
    assert linear.dtype == linear.bias.dtype == linear(inputs(1, K).bfloat16()).dtype == torch.bfloat16
    assert linear.spec.dtype == "bfloat16"
    linear.bfloat16()
    linear.to("cpu", torch.bfloat16)
    linear.to(torch.float32)
    before = state.pop("bias")
    after = linear.state_dict()
    assert torch.equal(after.pop("bias"), before.bfloat16().float())
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in state.items()}
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_casting_to_the_dtype_that_it_has_changes_nothing(toy):
    linear, _, _ = make(dtype=torch.bfloat16)
    linear.bind()
    before = {name: tensor.clone() for name, tensor in linear.weight_state.tensors().items()}
    linear.to(torch.bfloat16)
    after = linear.weight_state.tensors()
    assert after["steps"].dtype == torch.float32
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_prepared_tensors_are_buffers_that_are_not_saved(toy):
    linear, state, _ = make()
    assert not list(linear.buffers())
    linear.bind()
    resident = linear.weight_state.tensors()
    assert linear.qweight is None
    assert {id(tensor) for tensor in linear.buffers()} == {id(tensor) for tensor in resident.values()}
    assert sum(t.nbytes for t in linear.buffers()) == linear.weight_state.plan.resident.nbytes(linear.spec)
    assert_same_state(linear, state)
    linear.weight_state.unbind()
    assert not list(linear.buffers())
    assert_same_state(linear, state)


def test_share_memory(backend):
    linear, state, _ = make()
    linear.bind()
    assert linear.share_memory() is linear
    assert all(tensor.is_shared() for tensor in [*linear.weight_state.tensors().values(), linear.bias])
    assert all(tensor.is_shared() for tensor in linear.buffers())
    assert_same_state(linear, state)


def test_to_meta_and_back_with_new_weights(backend):
    with torch.device("meta"):
        linear = AwqLinear(K, N, G, bias=True, dtype=torch.float32)
    linear.bind()  # nothing is there to bind yet
    assert not linear.plans
    _, state, weight = make()
    linear.load_state_dict(state, assign=True)
    assert_close(linear(inputs(2, K)), inputs(2, K) @ weight.T + state["bias"])
    assert_same_state(linear, state)
    bound_before = bool(linear.plans)
    linear.to("meta")
    assert bound_before
    assert not linear.plans
    assert all(tensor.device.type == "meta" for tensor in linear.state_dict().values())


def test_loading_into_a_bound_linear_binds_the_new_weight(backend):
    linear, _, _ = make()
    linear.bind()
    before = linear(inputs(2, K))
    codes = quantize_weight(torch.ones(N, K), G)
    new = {**checkpoint_layout("gemm").pack(codes), "bias": torch.zeros(N)}
    assert linear.load_state_dict(new).missing_keys == []
    assert linear.plans
    y = linear(inputs(2, K))
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, inputs(2, K) @ dequantize(codes, torch.float32), atol=1e-4, rtol=1e-4)
    assert_same_state(linear, new)


def test_a_state_dict_of_another_shape_is_torchs_error(backend):
    linear, state, _ = make()
    linear.bind()
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        linear.load_state_dict({**state, "qweight": state["qweight"][:64]})


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
def test_copies(backend, bound):
    linear, state, _ = make()
    if bound:
        linear.bind()
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    wanted = linear(inputs(2, K)) if bound else None
    for made in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear)), torch.load(file, weights_only=False)):
        assert made.weight_state.owner is made
        assert bool(made.plans) is bound
        assert_same_state(made, state)
        if bound:
            torch.testing.assert_close(made(inputs(2, K)), wanted)
        assert_same_state(linear, state)  # the original is left alone
        made.load_state_dict({**state, "bias": torch.zeros(N)})
        assert torch.equal(linear.bias, state["bias"])
    assert bool(linear.plans) is bound


def test_dequantize(backend):
    linear, _, weight = make()
    assert torch.equal(linear.dequantize(), weight)
    linear.bind()
    assert torch.equal(linear.dequantize(), weight)
    assert linear.dequantize(torch.float16).dtype == torch.float16


def test_forward_does_not_change_the_stored_tensors(backend):
    linear, state, _ = make()
    for rows in (1, 4, 5, 40):
        linear(inputs(rows, K))
    assert_same_state(linear, state)


def test_binding_inside_a_compiled_region(backend):
    linear, _, weight = make(dtype=torch.float32)
    linear.requires_grad_(False)
    compiled = torch.compile(linear, backend="eager")
    x = inputs(3, K)
    assert_close(compiled(x), linear(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, x.bfloat16().float() @ weight.T + linear.bias.float())


def test_tensors_that_are_not_contiguous(backend):
    linear, state, weight = make(dtype=torch.bfloat16, bias=False)
    turned = {name: tensor.t().contiguous().t() for name, tensor in state.items()}
    linear.load_state_dict(turned, assign=True)
    linear.requires_grad_(False)
    x = inputs(3, K, dtype=torch.bfloat16)
    assert_close(linear(x), x.float() @ weight.T)


def test_a_bias_that_is_parametrized():
    linear, _, _ = make()
    x = inputs(3, K)
    wanted = linear(x)
    nn.utils.parametrize.register_parametrization(linear, "bias", nn.Identity())
    assert torch.equal(linear(x), wanted)
