"""The layer computes the paper's equations, whichever way it is evaluated."""

from __future__ import annotations

import copy
import itertools
import pickle

import oracle
import pytest
import torch
from torch import Tensor

from hypermixer import HyperMixing

F64 = torch.float64


def make(**options) -> HyperMixing:
    defaults = {"init": "xavier", "dtype": F64}
    layer = HyperMixing(8, 16, 2, **{**defaults, **options})
    with torch.no_grad():  # biases and the norm start from constants, which would hide mistakes
        for name, parameter in layer.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.normal_()
    return layer


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * probe).sum(), inputs))


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_golden_numbers_of_two_tokens():
    layer = HyperMixing(1, 1, norm=False, token_info=None, dtype=F64)
    x = torch.tensor([[[1.0], [2.0]]], dtype=F64)
    for u, expected in (
        (1.0, (3.996673092024, 9.284537093926)),
        (2.0, (15.986708600254, 37.138186084086)),
    ):
        with torch.no_grad():
            for net in (layer.w1, layer.w2):
                net.fc1_weight.fill_(1.0)
                net.fc2_weight.fill_(u)
        for algorithm in ("direct", "factored"):
            layer.algorithm = algorithm
            y = layer(x).flatten()
            torch.testing.assert_close(y, torch.tensor(expected, dtype=F64), rtol=0, atol=5e-13)


def test_golden_hidden_layer():
    x = torch.tensor([1.0, 2.0], dtype=F64)
    assert float((x * oracle.gelu(x)).sum()) == pytest.approx(4.750344218276, abs=5e-13)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head_hidden", ["split", "full"])
@pytest.mark.parametrize("style", ["sinusoidal", "idiap", None])
def test_self_mixing_equals_the_equations_with_gradients(tied, bias, head_hidden, style):
    x = torch.randn(2, 6, 8, dtype=F64, requires_grad=True)
    layer = make(tied=tied, bias=bias, head_hidden=head_hidden, token_info=style)
    inputs = [x, *layer.parameters()]
    expected = torch.stack([oracle.mix(oracle.state_of(layer), row, style=style) for row in x])
    wanted = [expected, *gradients(expected, inputs)]
    for algorithm, chunk_size in itertools.product(("direct", "factored", "auto"), (None, 1, 4)):
        layer.algorithm, layer.chunk_size = algorithm, chunk_size
        y = layer(x)
        assert_same([y, *gradients(y, inputs)], wanted)


@pytest.mark.parametrize("separate_value", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_cross_mixing_equals_the_equations_with_gradients(separate_value, bias):
    q, k, v = (torch.randn(2, n, 8, dtype=F64, requires_grad=True) for n in (3, 7, 7))
    layer = make(bias=bias)
    arguments = (q, k, v) if separate_value else (q, k)
    inputs = [*arguments, *layer.parameters()]
    rows = zip(*arguments, strict=True)
    expected = torch.stack([oracle.mix(oracle.state_of(layer), *row) for row in rows])
    wanted = [expected, *gradients(expected, inputs)]
    for algorithm, chunk_size in itertools.product(("direct", "factored", "auto"), (None, 2)):
        layer.algorithm, layer.chunk_size = algorithm, chunk_size
        y = layer(*arguments)
        assert_same([y, *gradients(y, inputs)], wanted)


def test_value_apart_from_key_in_self_mixing_also_when_tied():
    layer = make(tied=True)
    x, v = torch.randn(2, 1, 5, 8, dtype=F64)
    expected = oracle.mix(oracle.state_of(layer), x[0], x[0], v[0])
    torch.testing.assert_close(layer(x, x, v)[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x, value=v)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["auto", "factored"])
def test_long_inference_is_cut_to_what_caches_hold(algorithm):
    layer = HyperMixing(256, 512, 8, algorithm=algorithm)
    x = torch.randn(1, 5000, 256)
    with torch.no_grad():
        assert layer._chunk(x, 5000) == 2048
        chunked = layer(x)
    whole = layer(x)
    # float32 sums of 5,000 tokens in another order, LayerNormed
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-4)
    layer.algorithm = "direct"
    with torch.no_grad():
        assert layer._chunk(x, 5000) is None


def test_identity_activation_is_unnormalised_linear_attention():
    layer = make(activation="identity", norm=False, token_info=None)
    x = torch.randn(1, 9, 8, dtype=F64)
    w1, w2 = layer.generated_weights(x)
    v = x.view(1, 9, 2, 4).transpose(1, 2)
    expected = (w2 @ (w1.transpose(-1, -2) @ v)).transpose(1, 2).reshape(1, 9, 8)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


def test_identity_hypernetworks_give_x_xtx():
    layer = HyperMixing(4, 4, activation="identity", norm=False, token_info=None, dtype=F64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.eye(4, dtype=F64))
    x = torch.randn(1, 7, 4, dtype=F64)
    torch.testing.assert_close(layer(x), x @ (x.transpose(1, 2) @ x), rtol=0, atol=1e-10)


def test_zero_output_weights_leave_the_norm_bias():
    layer = make()
    with torch.no_grad():
        layer.w2.fc2_weight.zero_()
    y = layer(torch.randn(2, 5, 8, dtype=F64))
    torch.testing.assert_close(y, layer.norm.bias.expand(2, 5, 8), rtol=0, atol=0)


def test_heads_equal_one_head_with_block_diagonal_parameters():
    many = make(norm=False)
    one = HyperMixing(8, 16, 1, norm=False, dtype=F64)
    with torch.no_grad():
        for side in ("w1", "w2"):
            for name in ("fc1_weight", "fc2_weight"):
                blocks = getattr(getattr(many, side), name)
                getattr(getattr(one, side), name)[0] = torch.block_diag(*blocks)
    x = torch.randn(1, 6, 8, dtype=F64)
    # One head mixes every feature with every hidden unit; only the matching blocks are the heads'.
    w1, w2 = one.generated_weights(x)
    y = torch.zeros_like(x)
    for head in range(2):
        units, features = slice(8 * head, 8 * head + 8), slice(4 * head, 4 * head + 4)
        hidden = oracle.gelu(w1[0, 0][:, units].T @ x[0][:, features])
        y[0][:, features] = w2[0, 0][:, units] @ hidden
    torch.testing.assert_close(many(x), y, rtol=0, atol=1e-10)


def test_full_heads_with_one_head_equal_split_heads():
    split = HyperMixing(8, 16, 1, dtype=F64)
    full = HyperMixing(8, 16, 1, head_hidden="full", dtype=F64)
    full.load_state_dict(split.state_dict())
    x = torch.randn(2, 5, 8, dtype=F64)
    assert torch.equal(full(x), split(x))


def test_full_heads_have_h_times_the_hidden_units():
    assert make(head_hidden="full").w1.fc2_weight.shape == (2, 16, 4)
    assert make(head_hidden="split").w1.fc2_weight.shape == (2, 8, 4)


def test_hypernet_dim_sets_the_hidden_width():
    layer = make(hypernet_dim=12)
    assert layer.w1.fc1_weight.shape == (2, 6, 4)
    x = torch.randn(1, 5, 8, dtype=F64)
    expected = oracle.mix(oracle.state_of(layer), x[0])
    for algorithm in ("direct", "factored"):
        layer.algorithm = algorithm
        torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=1e-10)


def test_parameter_count_of_the_published_layer():
    layer = HyperMixing(512, 2048, 8, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == 328_704
    tied = HyperMixing(512, 2048, 8, tied=True, device="meta")
    assert sum(p.numel() for p in tied.parameters()) == 163_840 + 1_024


@pytest.mark.parametrize("length_scale", ["mean", "sqrt"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_length_scale_divides_the_sum_by_the_keys(length_scale, chunk_size):
    layer = make(length_scale=length_scale, norm=False, token_info=None, chunk_size=chunk_size)
    x = torch.randn(1, 6, 8, dtype=F64)
    mask = torch.tensor([[False, False, True, False, True, False]])
    w1, w2 = layer.generated_weights(x[:, ~mask[0]])
    v = x[:, ~mask[0]].view(1, 4, 2, 4).transpose(1, 2)
    p = w1.transpose(-1, -2) @ v / (4 if length_scale == "mean" else 2)
    expected = (w2 @ oracle.gelu(p)).transpose(1, 2).reshape(1, 4, 8)
    y = layer(x, key_padding_mask=mask)[:, ~mask[0]]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(x[:, ~mask[0]]), expected, rtol=0, atol=1e-10)


def test_no_keys_give_the_norm_bias_and_no_queries_nothing():
    for options in ({}, {"bias": True}, {"chunk_size": 3}, {"length_scale": "mean"}):
        layer = make(**options)
        q, none = torch.randn(2, 3, 8, dtype=F64), torch.zeros(2, 0, 8, dtype=F64)
        torch.testing.assert_close(layer(q, none), layer.norm.bias.expand(2, 3, 8))
        assert layer(none, q).shape == (2, 0, 8)
        assert layer(none).shape == (2, 0, 8)
    assert make(causal=True)(none).shape == (2, 0, 8)


def test_custom_norm_and_none():
    x = torch.randn(2, 5, 8, dtype=F64)
    raw = make(norm=False)
    normed = make(norm=torch.nn.RMSNorm(8, dtype=F64))
    normed.load_state_dict(raw.state_dict(), strict=False)
    torch.testing.assert_close(normed(x), normed.norm(raw(x)), rtol=0, atol=1e-10)
    assert raw.norm is None


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"bias": True}, {"length_scale": "sqrt"}])
@pytest.mark.parametrize("algorithm", ["direct", "factored"])
def test_first_and_second_derivatives(options, algorithm):
    layer = HyperMixing(4, 4, 2, init="xavier", dtype=F64, algorithm=algorithm, **options)
    x = torch.randn(1, 3, 4, dtype=F64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))


def test_chunked_gradients_by_finite_differences():
    layer = HyperMixing(4, 4, 2, init="xavier", dtype=F64, chunk_size=2, bias=True)
    q, k = (torch.randn(1, n, 4, dtype=F64, requires_grad=True) for n in (3, 5))
    assert torch.autograd.gradcheck(layer, (q, k))


def test_chunked_layer_refuses_a_second_derivative():
    layer = HyperMixing(4, chunk_size=2)
    x = torch.randn(1, 5, 4, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_torch_func_transforms():
    layer = make()
    x = torch.randn(3, 1, 4, 8, dtype=F64)
    torch.testing.assert_close(torch.func.vmap(layer)(x), torch.stack([layer(row) for row in x]))
    jacobian = torch.func.jacrev(layer)(x[0])
    expected = torch.autograd.functional.jacobian(layer, x[0])
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-10)


def test_copies_are_equal():
    x = torch.randn(2, 5, 8, dtype=F64)
    for options in (
        {},
        {"activation": "silu"},
        {"activation": "identity"},
        {"token_info": "idiap"},
    ):
        layer = make(**options)
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), expected)


def test_meta_device_then_reset_parameters():
    layer = HyperMixing(8, 16, 2, bias=True, token_info="learned", max_length=9, device="meta")
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    fresh = HyperMixing(8, 16, 2, bias=True, token_info="learned", max_length=9)
    torch.manual_seed(3)
    fresh.reset_parameters()
    for a, b in zip(layer.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_repr_names_what_is_not_default():
    text = repr(HyperMixing(8, 16, 2, bias=True, chunk_size=7, algorithm="direct"))
    assert "8, 16, num_heads=2, tied=False, bias=True, chunk_size=7, algorithm='direct'" in text


def test_generated_weights_of_cross_mixing():
    layer = make(bias=True)
    q, k = torch.randn(1, 3, 8, dtype=F64), torch.randn(1, 5, 8, dtype=F64)
    w1, w2 = layer.generated_weights(q, k)
    for head in range(2):
        state = oracle.state_of(layer)
        expected1 = oracle.weights(oracle.inform(k[0], "sinusoidal"), state, "w1", head)
        expected2 = oracle.weights(oracle.inform(q[0], "sinusoidal"), state, "w2", head)
        torch.testing.assert_close(w1[0, head], expected1, rtol=0, atol=1e-10)
        torch.testing.assert_close(w2[0, head], expected2, rtol=0, atol=1e-10)


def test_hypernet_module_gives_the_generated_weights():
    layer = make(token_info=None)
    x = torch.randn(2, 5, 8, dtype=F64)
    torch.testing.assert_close(layer.w1(x), layer.generated_weights(x)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_stacked_hypernetworks_equal_two(bias):
    """On accelerators both hypernetworks' first layers are one product."""
    layer = HyperMixing(8, 16, 2, bias=bias, device="meta")
    g1, g2 = layer._hidden_both(torch.empty(3, 5, 8, device="meta"))
    assert g1.shape == g2.shape == (2, 3, 5, 4)
    layer = make(bias=bias)
    x = torch.randn(3, 5, 8, dtype=F64)
    for got, wanted in zip(layer._hidden_stacked(x), layer._hidden_both(x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_cpu(dtype):
    layer = HyperMixing(64, 256, 4)
    x = torch.randn(2, 300, 64)
    mask = torch.zeros(2, 300, dtype=torch.bool)
    mask[0, 200:] = True
    expected = layer(x, key_padding_mask=mask)
    there = copy.deepcopy(layer).to("cuda", dtype)
    y = there(x.to("cuda", dtype), key_padding_mask=mask.cuda()).float().cpu()
    tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"tied": True}, {"chunk_size": 2}, {"causal": True}], ids=str
)
def test_nothing_flows_back_through_detached_keys(options):
    layer = HyperMixing(8, 16, 2, dtype=torch.float64, **options)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    toward = torch.randn(1, 5, 8, dtype=torch.float64)

    wanted = x.clone().requires_grad_()
    (layer(wanted, wanted.detach()) * toward).sum().backward()
    numeric = torch.zeros_like(x)
    twin = HyperMixing(8, 16, 2, dtype=torch.float64)
    twin.load_state_dict({**layer.state_dict(), **_second_of(layer)})
    if layer.causal:  # a token's query reaches its own output alone, from the state of its prefix

        def value(query):
            rows = []
            for t in range(5):
                prefix = twin.write(twin.init_state(1), x[:, : t + 1])
                rows.append(twin.read(prefix, query[:, t : t + 1], torch.tensor([t])))
            return (torch.cat(rows, 1) * toward).sum()

    else:

        def value(query):
            return (twin(query, x.clone()) * toward).sum()

    with torch.no_grad():
        for place in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=torch.float64)
            step[place] = 1e-5
            step = step.view_as(x)
            numeric.view(-1)[place] = (value(x + step) - value(x - step)) / 2e-5
    torch.testing.assert_close(wanted.grad, numeric, rtol=1e-5, atol=1e-7)


def _second_of(layer):
    """The reading hypernetwork of a tied layer, for an untied one."""
    state = layer.state_dict()
    return {n.replace("w1.", "w2."): t for n, t in state.items() if layer.tied and "w1." in n}
