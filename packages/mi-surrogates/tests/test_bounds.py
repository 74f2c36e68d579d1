"""The bounds against float64 NumPy and their identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_surrogates.information.bounds import (
    donsker_varadhan,
    infonce,
    js,
    log_mean_exp,
    mine_loss,
    nwj,
    smile,
)

POS = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
NEG = torch.randn(3, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
SQUARE = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3


def test_bounds_equal_their_formulas_in_numpy() -> None:
    p, q, s = POS.numpy(), NEG.numpy(), SQUARE.numpy()
    mean_exp = np.exp(q).mean(-1)
    assert np.allclose(donsker_varadhan(POS, NEG), p.mean(-1) - np.log(mean_exp), atol=1e-13)
    assert np.allclose(nwj(POS, NEG), p.mean(-1) - mean_exp / math.e, atol=1e-12)
    clipped = np.exp(q.clip(-1, 1)).mean(-1)
    assert np.allclose(smile(POS, NEG, 1.0), p.mean(-1) - np.log(clipped), atol=1e-13)
    shannon = -np.log1p(np.exp(-p)).mean(-1) - np.log1p(np.exp(q)).mean(-1)
    assert np.allclose(js(POS, NEG), shannon, atol=1e-13)
    rows = [np.mean([m[i, i] - np.log(np.exp(m[i]).mean()) for i in range(6)]) for m in s]
    assert np.allclose(infonce(SQUARE), rows, atol=1e-13)


def test_donsker_varadhan_does_not_change_under_a_shift_of_the_critic() -> None:
    assert torch.allclose(donsker_varadhan(POS + 5, NEG + 5), donsker_varadhan(POS, NEG))


def test_nwj_maximised_over_the_shift_is_donsker_varadhan() -> None:
    shift = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    values = nwj(POS[:1] + shift[:, None], NEG[:1] + shift[:, None])
    # the maximum is flat: a grid of 1e-4 is off by less than (1e-4)² / 2
    assert values.max().item() == pytest.approx(donsker_varadhan(POS, NEG)[0].item(), abs=1e-8)
    best = 1 - log_mean_exp(NEG)[0].item()
    assert shift[values.argmax()].item() == pytest.approx(best, abs=1e-4)


def test_smile_without_clipping_is_donsker_varadhan() -> None:
    assert torch.equal(smile(POS, NEG, math.inf), donsker_varadhan(POS, NEG))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.integers(0, 10_000), st.floats(0.01, 500))
def test_infonce_never_exceeds_the_logarithm_of_the_batch(
    size: int, seed: int, scale: float
) -> None:
    scores = scale * torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert infonce(scores).item() <= math.log(size) + 1e-12


def test_infonce_refuses_scores_that_are_not_square() -> None:
    with pytest.raises(ValueError, match="B, B"):
        infonce(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "bound", [donsker_varadhan, nwj, smile, js, lambda p, n: mine_loss(p, n, None, 1.0)[0]]
)
def test_gradients_are_those_of_finite_differences(bound) -> None:
    pos, neg = (v.clone().requires_grad_() for v in (POS, NEG))
    assert torch.autograd.gradcheck(bound, (pos, neg))
    assert torch.autograd.gradcheck(infonce, SQUARE.clone().requires_grad_())


@pytest.mark.parametrize("bound", [donsker_varadhan, nwj, smile, js])
@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_large_logits_stay_finite_in_float32(bound, logit: float) -> None:
    pos = torch.full((5,), logit, requires_grad=True)
    neg = torch.full((5,), logit, requires_grad=True)
    value = bound(pos, neg)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(pos.grad).all()
    assert torch.isfinite(neg.grad).all()
    assert torch.isfinite(infonce(torch.full((4, 4), logit)))


def test_bfloat16_scores_are_reduced_in_float32() -> None:
    neg = torch.full((1000,), 0.5, dtype=torch.bfloat16)
    assert donsker_varadhan(neg, neg).dtype == torch.float32


def test_optimal_critic_of_a_gaussian_gives_the_truth() -> None:
    rho, size = 0.9, 200_000
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, size, generator=generator, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * noise
    truth = -0.5 * math.log(1 - rho**2)

    def ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        quadratic = (rho * x) ** 2 + (rho * y) ** 2 - 2 * rho * x * y
        return truth - quadratic / (2 * (1 - rho**2))

    pos, neg = ratio(x, y), ratio(x, y.roll(1))
    spread = math.hypot(pos.std().item(), neg.exp().std().item()) / math.sqrt(size)
    assert abs(donsker_varadhan(pos, neg).item() - truth) < 3 * spread
    assert abs(nwj(pos + 1, neg + 1).item() - truth) < 3 * spread
    assert abs(smile(pos, neg, 50.0).item() - truth) < 3 * spread
    block = 500  # InfoNCE's bias at the optimum is of order e^I / B
    blocks = x.reshape(-1, block), y.reshape(-1, block)
    nce = infonce(ratio(blocks[0][:40, :, None], blocks[1][:40, None, :])).mean().item()
    assert (
        truth - 3 * math.exp(truth) / block < nce < truth + 3 * pos.std().item() / math.sqrt(20_000)
    )


def test_moving_average_makes_the_batch_gradient_that_of_the_full_batch() -> None:
    """With m the long-run mean of e^T, the average of batch gradients is the full-batch gradient."""
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    data = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = torch.autograd.grad(-donsker_varadhan(weight * data[:1], weight * data), weight)[0]

    def averaged(alpha: float) -> float:
        state, total, count = None, 0.0, 0
        for repeat in range(3):
            for batch in data.reshape(-1, 10):
                loss, state = mine_loss(weight * data[:1], weight * batch, state, alpha)
                if repeat == 2:
                    total += torch.autograd.grad(loss, weight)[0].item()
                    count += 1
        return total / count

    biased, corrected = abs(averaged(1.0) - full.item()), abs(averaged(1e-3) - full.item())
    assert corrected < 0.01 * abs(full.item())
    assert corrected < biased / 5


def test_mine_loss_has_the_value_of_the_bound() -> None:
    loss, state = mine_loss(POS, NEG)
    assert torch.allclose(loss, -donsker_varadhan(POS, NEG))
    again, new = mine_loss(POS, NEG + 1, state, 0.25)
    expected = torch.log(0.75 * state.exp() + 0.25 * (NEG + 1).exp().mean(-1))
    assert torch.allclose(new, expected)
    assert torch.allclose(again, -donsker_varadhan(POS, NEG + 1))
