"""Pseudo-attention is the norm of Jacobian blocks; memory is counted as tensors come and go."""

from __future__ import annotations

import pytest
import torch

from hypermixer import HyperMixing
from hypermixer.analysis import measure_memory, pseudo_attention

F64 = torch.float64


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"tied": True}], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 7, 256])
def test_exact_pseudo_attention_is_the_jacobians_block_norm(options, chunk_size):
    layer = HyperMixing(8, 16, 2, init="xavier", dtype=F64, **options)
    x = torch.randn(2, 5, 8, dtype=F64)
    got = pseudo_attention(layer, x, chunk_size=chunk_size)
    assert not got.requires_grad
    for row in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda t: layer(t[None])[0], x[row])
        expected = jacobian.square().sum((1, 3)).sqrt()
        torch.testing.assert_close(got[row], expected, rtol=0, atol=1e-10)


def test_probes_estimate_the_same_norm():
    layer = HyperMixing(8, 16, 2, init="xavier", dtype=F64)
    x = torch.randn(1, 5, 8, dtype=F64)
    exact = pseudo_attention(layer, x)
    generator = torch.Generator().manual_seed(0)
    # 4,000 probes: the relative error of a squared norm is about √(2/4000) ≈ 2 %
    many = pseudo_attention(layer, x, method="probe", num_samples=4000, generator=generator)
    torch.testing.assert_close(many, exact, rtol=0.06, atol=0)
    one = pseudo_attention(layer, x, method="probe", generator=generator)
    assert one.shape == (1, 5, 5)


def test_cross_mixing_gives_a_rectangle():
    layer = HyperMixing(8)
    q = torch.randn(1, 3, 8)
    assert pseudo_attention(lambda keys: layer(q, keys), torch.randn(1, 5, 8)).shape == (1, 3, 5)


def test_options_are_checked():
    x = torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="method must be one of 'exact', 'probe'; got 'guess'"):
        pseudo_attention(HyperMixing(8), x, method="guess")
    with pytest.raises(ValueError, match="num_samples must be a positive int, got 0"):
        pseudo_attention(HyperMixing(8), x, num_samples=0)
    with pytest.raises(ValueError, match="chunk_size must be a positive int, got -1"):
        pseudo_attention(HyperMixing(8), x, chunk_size=-1)


def test_memory_counts_what_is_alive_at_a_time():
    def function():
        a = torch.ones(1000)
        b = a + 1  # 2 alive
        del a
        c = b.view(10, 100) * 2  # 2 alive, the view is none
        return c.sum()

    use = measure_memory(function)
    assert use.peak_bytes == 8004  # with the sum
    assert use.largest_numel == 1000
    x = torch.ones(50)
    assert measure_memory(lambda: x.add_(1)).peak_bytes == 0
