"""The pure functions: both forms, the rule that chooses, and the point where kernels are called."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
import torch.nn.functional as F

from hypermixer import HyperMixing, kernels
from hypermixer.functional import (
    ACTIVATIONS,
    accumulation_dtype,
    crossover_length,
    get_activation,
    hyper_mix,
    mix_direct,
)

F64 = torch.float64


def tensors(batch=2, heads=3, keys=7, queries=4, h=5, k=6, f=4):
    shapes = [
        (batch, heads, keys, h),
        (heads, k, h),
        (batch, heads, queries, h),
        (heads, k, h),
        (batch, heads, keys, f),
    ]
    return [torch.randn(*shape, dtype=F64, requires_grad=True) for shape in shapes]


def equations(g1, u1, g2, u2, value, c1=None, c2=None, activation=oracle.gelu):
    w1 = torch.einsum("bhnr,hkr->bhnk", g1, u1)
    w2 = torch.einsum("bhmr,hkr->bhmk", g2, u2)
    if c1 is not None:
        w1, w2 = w1 + c1[None, :, None], w2 + c2[None, :, None]
    return torch.einsum(
        "bhmk,bhkf->bhmf", w2, activation(torch.einsum("bhnk,bhnf->bhkf", w1, value))
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("algorithm", ["direct", "factored", "auto"])
def test_hyper_mix_equals_the_equations_with_gradients(bias, algorithm):
    inputs = tensors()
    biases = {}
    if bias:
        biases = {n: torch.randn(3, 6, dtype=F64, requires_grad=True) for n in ("c1", "c2")}
    expected = equations(*inputs, **biases)
    got = hyper_mix(*inputs, **biases, algorithm=algorithm)
    probe = torch.randn_like(expected)
    leaves = [*inputs, *biases.values()]
    wanted = torch.autograd.grad((expected * probe).sum(), leaves)
    grads = torch.autograd.grad((got * probe).sum(), leaves)
    for a, b in zip([got, *grads], [expected, *wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_mix_direct_is_the_equation():
    w1, w2, v = (torch.randn(2, 3, n, c, dtype=F64) for n, c in ((7, 6), (4, 6), (7, 5)))
    expected = w2 @ oracle.gelu(w1.transpose(-1, -2) @ v)
    torch.testing.assert_close(mix_direct(w1, w2, v), expected, rtol=0, atol=1e-10)
    cube = mix_direct(w1, w2, v, activation=lambda t: t**3)
    torch.testing.assert_close(cube, w2 @ (w1.transpose(-1, -2) @ v) ** 3, rtol=0, atol=1e-8)


@pytest.mark.parametrize("algorithm", ["direct", "factored"])
def test_masked_rows_may_hold_anything(algorithm):
    g1, u1, g2, u2, value = (t.detach() for t in tensors())
    key_mask = torch.tensor([[False] * 5 + [True] * 2, [True] * 7])
    query_mask = torch.tensor([[False, False, True, False], [False] * 4])
    clean = equations(g1[:1, :, :5], u1, g2[:1], u2, value[:1, :, :5])
    g1[0, :, 5:], value[0, :, 5:], g2[0, :, 2] = float("nan"), float("inf"), float("nan")
    g1[1], value[1] = float("nan"), float("nan")
    y = hyper_mix(
        g1, u1, g2, u2, value, key_mask=key_mask, query_mask=query_mask, algorithm=algorithm
    )
    torch.testing.assert_close(y[0, :, [0, 1, 3]], clean[0, :, [0, 1, 3]], rtol=0, atol=1e-10)
    assert torch.equal(y[0, :, 2], torch.zeros(3, 4, dtype=F64))
    assert torch.equal(y[1], torch.zeros(3, 4, 4, dtype=F64))


def test_activations_by_name():
    x = torch.linspace(-3, 3, 50, dtype=F64)
    torch.testing.assert_close(get_activation("gelu")(x), oracle.gelu(x), rtol=0, atol=1e-14)
    assert torch.equal(get_activation("identity")(x), x)
    assert get_activation(torch.sin) is torch.sin
    assert {name: f for name, f in ACTIVATIONS.items() if f is F.relu} == {"relu": F.relu}


def test_crossover_formulas():
    assert crossover_length(64, 64, 64) == 64
    assert crossover_length(4 * 64, 64, 64) == pytest.approx(4 * 64 / 7)
    assert crossover_length(32, 64, 64) == float("inf")
    assert crossover_length(20, 64, 64) == float("inf")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("k", "h", "f"), [(64, 64, 64), (256, 64, 64), (40, 64, 64), (30, 10, 7)])
def test_the_rule_picks_the_form_with_fewer_operations(tied, k, h, f):
    for n in itertools.chain(range(1, 60), (1000, 10_000)):
        generation = 1 if tied else 2
        direct = generation * n * h * k + 2 * n * k * f
        factored = 2 * n * h * f + 2 * k * h * f
        key, query = kernels.choose_direct("auto", n, n, k, h, f, tied=tied)
        assert key == query == (direct < factored)


def test_each_side_is_decided_by_its_own_length():
    assert kernels.choose_direct("auto", 1000, 3, 64, 64, 64, tied=False) == (False, True)
    assert kernels.choose_direct("auto", 3, 1000, 64, 64, 64, tied=False) == (True, False)
    assert kernels.choose_direct("direct", 1000, 1000, 64, 64, 64, tied=False) == (True, True)
    layer = HyperMixing(8, 16, 2, dtype=F64)
    q, k = torch.randn(1, 1, 8, dtype=F64), torch.randn(1, 50, 8, dtype=F64)
    expected = oracle.mix(oracle.state_of(layer), q[0], k[0])
    torch.testing.assert_close(layer(q, k)[0], expected, rtol=0, atol=1e-10)


def test_a_registered_kernel_is_called():
    calls = []

    def kernel(g1, u1, c1, g2, u2, c2, value, activation, *, tied, scale):
        from hypermixer.functional import mix_heads

        calls.append(g1.shape)
        return mix_heads(
            g1, u1, c1, g2, u2, c2, value, activation,
            key_direct=False, query_direct=False, tied=tied, scale=scale,
        )  # fmt: skip

    kernels.register_kernel("counting", kernel)
    try:
        layer = HyperMixing(8, 16, 2, algorithm="counting")
        plain = HyperMixing(8, 16, 2, algorithm="factored")
        plain.load_state_dict(layer.state_dict())
        x = torch.randn(3, 5, 8)
        assert torch.equal(layer(x), plain(x))
        assert calls == [(2, 3, 5, 4)]
    finally:
        del kernels._KERNELS["counting"]


def test_sums_are_kept_in_float32_for_sixteen_bit_types():
    assert accumulation_dtype(torch.bfloat16) == torch.float32
    assert accumulation_dtype(F64) == F64
    # 4,096 times 1 + 2^-8 in bfloat16: a bfloat16 sum would be off by more than its last bit
    g = torch.ones(1, 1, 4096, 1, dtype=torch.bfloat16)
    u = torch.ones(1, 1, 1, dtype=torch.bfloat16)
    v = torch.full((1, 1, 4096, 1), 1.0078125, dtype=torch.bfloat16)
    seen = []
    hyper_mix(g, u, g[:, :, :1], u, v, activation=lambda t: seen.append(t) or t)
    assert seen[0].dtype == torch.float32
    assert float(seen[0]) == 4096 * 1.0078125
