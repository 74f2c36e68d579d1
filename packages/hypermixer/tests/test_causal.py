"""Causal and block-causal mixing equal plain mixing of every prefix; streaming equals both."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypermixer import HyperMixing, MixingState

F64 = torch.float64


def pair(**options) -> tuple[HyperMixing, HyperMixing]:
    """A causal layer and a plain one with its parameters."""
    plain = {k: v for k, v in options.items() if k not in ("causal", "block_size", "chunk_size")}
    layer = HyperMixing(8, 16, 2, init="xavier", dtype=F64, **options)
    other = HyperMixing(8, 16, 2, dtype=F64, **plain)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_()
    other.load_state_dict(layer.state_dict())
    return layer, other


def by_prefixes(plain: HyperMixing, x, block: int, mask=None):
    """The plain layer on every prefix of whole blocks, keeping the last block's rows."""
    rows = []
    for t in range(x.shape[1]):
        end = min((t // block + 1) * block, x.shape[1])
        part = None if mask is None else mask[:, :end]
        rows.append(plain(x[:, :end], key_padding_mask=part)[:, t])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("block", [1, 2, 4, 11, 20])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"tied": True}, {"length_scale": "mean"}], ids=str
)
def test_block_causal_equals_prefix_evaluation_with_gradients(block, options):
    layer, plain = pair(block_size=block, **options)
    x = torch.randn(2, 11, 8, dtype=F64, requires_grad=True)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 9:] = mask[1, :2] = True
    expected = by_prefixes(plain, x, block, mask)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), [x, *plain.parameters()])
    for algorithm, chunk_size in itertools.product(("direct", "factored"), (None, 1, 5)):
        layer.algorithm, layer.chunk_size = algorithm, chunk_size
        y = layer(x, key_padding_mask=mask)
        grads = torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])
        for a, b in zip([y, *grads], [expected, *wanted], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_block_size_one_is_causal_and_block_size_n_is_plain():
    x = torch.randn(2, 7, 8, dtype=F64)
    causal, plain = pair(causal=True)
    one, _ = pair(block_size=1)
    whole, _ = pair(block_size=7)
    for layer in (one, whole):
        layer.load_state_dict(causal.state_dict())
    assert causal.block_size == 1
    assert torch.equal(causal(x), one(x))
    torch.testing.assert_close(whole(x), plain(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("algorithm", ["direct", "factored"])
@pytest.mark.parametrize("block", [1, 2])
def test_gradients_from_the_future_are_exactly_zero(chunk_size, algorithm, block):
    layer, _ = pair(block_size=block, chunk_size=chunk_size, algorithm=algorithm)
    x = torch.randn(1, 8, 8, dtype=F64, requires_grad=True)
    y = layer(x)
    for t in range(8):
        (grad,) = torch.autograd.grad(y[0, t, 0], x, retain_graph=True)
        seen = (t // block + 1) * block
        assert torch.equal(grad[0, seen:], torch.zeros_like(grad[0, seen:]))
        assert grad[0, :seen].abs().max() > 0


def test_causal_gradients_by_finite_differences():
    for chunk_size in (None, 2):
        layer = HyperMixing(4, 4, 2, init="xavier", dtype=F64, causal=True, chunk_size=chunk_size)
        x = torch.randn(1, 5, 4, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))


def test_chunked_causal_keeps_boundary_states_only():
    layer = HyperMixing(8, 512, dtype=F64, causal=True, chunk_size=16, token_info=None)
    x = torch.randn(1, 256, 8, dtype=F64)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.numel()) or t, lambda t: t
    ):
        layer(x.requires_grad_())
    # 16 boundaries of a state 512 × 8; all 256 prefix states would be 16 times as many numbers
    assert max(held) == 16 * 512 * 8


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"tied": True}, {"length_scale": "sqrt"}], ids=str
)
def test_steps_equal_the_parallel_form(options):
    layer, _ = pair(causal=True, **options)
    x = torch.randn(3, 6, 8, dtype=F64)
    state = layer.init_state(3)
    rows = []
    for t in range(6):
        y, state = layer.step(x[:, t], state)
        rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), layer(x), rtol=0, atol=1e-10)
    assert state.position == 6
    assert torch.equal(state.count, torch.full((3,), 6.0, dtype=F64))


def test_steps_of_blocks_equal_the_parallel_form():
    layer, _ = pair(block_size=3, bias=True)
    x = torch.randn(2, 8, 8, dtype=F64)
    state = layer.init_state(2)
    parts = []
    for part in x.split(3, dim=1):
        y, state = layer.step(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-10)


def test_write_then_read_equals_cross_mixing():
    layer, _ = pair(bias=True)
    q, k, v = (torch.randn(2, n, 8, dtype=F64) for n in (3, 7, 7))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 4:] = True
    state = layer.init_state(2)
    for part in (slice(0, 3), slice(3, 7)):
        state = layer.write(state, k[:, part], v[:, part], mask=mask[:, part])
    expected = layer(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(layer.read(state, q), expected, rtol=0, atol=1e-10)
    assert state.count.tolist() == [4.0, 7.0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_writing_is_additive_and_removal_restores(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    layer, _ = pair(bias=seed % 2 == 0)
    a = torch.randn(1, n, 8, dtype=F64, generator=generator)
    b = torch.randn(1, m, 8, dtype=F64, generator=generator)
    empty = layer.init_state(1)
    first = layer.write(empty, a, position_ids=torch.arange(n))
    second = layer.write(empty, b, position_ids=torch.arange(n, n + m))
    both = layer.write(empty, torch.cat([a, b], 1))
    torch.testing.assert_close((first + second).sums, both.sums, rtol=0, atol=1e-10)
    ids = torch.arange(n, n + m)
    back = layer.write(both, b, position_ids=ids, remove=True)
    torch.testing.assert_close(back.sums, first.sums, rtol=0, atol=1e-6)
    torch.testing.assert_close((both - second).sums, first.sums, rtol=0, atol=1e-6)
    assert torch.equal(back.count, first.count)


def test_positions_go_on_from_write_to_write():
    layer, _ = pair(token_info="idiap")
    x = torch.randn(1, 5, 8, dtype=F64)
    state = layer.write(layer.write(layer.init_state(1), x[:, :2]), x[:, 2:])
    expected = layer.write(layer.init_state(1), x)
    torch.testing.assert_close(state.sums, expected.sums, rtol=0, atol=1e-10)


def test_state_is_float32_for_sixteen_bit_layers_and_can_be_moved():
    layer = HyperMixing(8, dtype=torch.bfloat16, bias=True)
    state = layer.init_state(2)
    assert state.sums.dtype == torch.float32
    assert state.sums.shape == (2, 1, 9, 8)
    written = layer.write(state, torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert written.sums.requires_grad
    assert not written.detach().sums.requires_grad
    assert isinstance(written.to("cpu"), MixingState)
    assert layer.read(written, torch.randn(2, 1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("block", [1, 4])
def test_recomputation_runs_under_the_autocast_of_the_forward_pass(block):
    gradients = []
    for chunk in (None, 4):
        torch.manual_seed(0)
        layer = HyperMixing(16, 32, 2, init="xavier", block_size=block, chunk_size=chunk)
        x = torch.randn(2, 12, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        (y.float() * torch.linspace(-1, 1, 16)).sum().backward()
        gradients.append(x.grad)
    whole, pieces = gradients
    assert (pieces - whole).norm() < 0.05 * whole.norm()


@pytest.mark.parametrize("options", [{"causal": True}, {"block_size": 3}, {}], ids=str)
def test_an_activation_with_parameters_is_trained_in_pieces_too(options):
    x = torch.randn(1, 9, 8, dtype=F64)
    toward = torch.randn(1, 9, 8, dtype=F64)
    layer = HyperMixing(
        8, 16, 2, chunk_size=3, activation=torch.nn.PReLU(dtype=F64), dtype=F64, **options
    )
    (layer(x) * toward).sum().backward()
    slope = layer.activation.weight
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            slope += sign * 1e-6
            values.append((layer(x) * toward).sum())
            slope -= sign * 1e-6
    numeric = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close(slope.grad[0], numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"causal": True}, {"block_size": 3}, {}], ids=str)
def test_torch_func_goes_through_layers_with_a_chunk_size(options):
    layer = HyperMixing(8, 16, 2, chunk_size=3, dtype=F64, **options)
    x = torch.randn(3, 1, 9, 8, dtype=F64, requires_grad=True)
    toward = torch.randn(9, 8, dtype=F64)
    each = torch.func.vmap(torch.func.grad(lambda t: (layer(t)[0] * toward).sum()))(x.detach())
    (layer(x[:, 0]) * toward).sum().backward()
    torch.testing.assert_close(each, x.grad, rtol=1e-9, atol=1e-10)


def test_torch_func_goes_through_long_sequences_without_gradients():
    layer = HyperMixing(8, 16, 2, dtype=F64)
    x = torch.randn(2, 1, 70_000, 8, dtype=F64)  # beyond what a CPU mixes in one piece
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x)[:, 0], layer(x[:, 0]))


def test_a_block_is_stepped_whole():
    layer = HyperMixing(8, 16, 2, block_size=4)
    x = torch.randn(1, 8, 8)
    _, state = layer.step(x[:, :3], layer.init_state(1))  # the last block may be short
    with pytest.raises(ValueError, match="within a block, after 3 tokens, but block_size=4"):
        layer.step(x[:, 3:4], state)


@pytest.mark.parametrize("other", [{"num_heads": 4}, {"bias": True}, {"hypernet_dim": 16}])
def test_a_state_of_another_layer_is_refused(other):
    layer, x = HyperMixing(8, 16, 2, causal=True), torch.randn(1, 2, 8)
    state = HyperMixing(8, 16, **{"num_heads": 2, **other}).init_state(1)
    for use in (layer.read, lambda s, t: layer.step(t[:, 0], s)):
        with pytest.raises(ValueError, match="from a layer of other sizes"):
            use(state, x)
    with pytest.raises(ValueError, match="from a layer of other sizes"):
        layer.write(state, x)
