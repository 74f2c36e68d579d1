from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import make_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradient_alignment as ga
from gradient_alignment.interpret.fooling import HighFrequencyShift, QuadraticShift

F64 = torch.float64


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, generator=generator, dtype=F64), torch.tensor([0, 2, 1, 2, 0, 1])


def gradient_of(g, x: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    return torch.autograd.grad(g(point).sum(), point)[0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.floats(-3, 3), kind=st.sampled_from("lqn"))
def test_a_shift_changes_logit_gradients_by_its_own_and_nothing_else(seed, exponent, kind):
    net, (x, y) = make_net(seed % 7), data(seed)
    scale, generator = 10.0**exponent, torch.Generator().manual_seed(seed)
    pattern = torch.randn(5, generator=generator, dtype=F64)
    network = make_net(seed % 11 + 1, classes=1).requires_grad_(False)
    g = {
        "l": ga.linear_shift(pattern, scale),
        "q": QuadraticShift(pattern, scale),
        "n": lambda x: scale * network(x).squeeze(1),
    }[kind]
    fooled = ga.ShiftedLogits(net, g)
    # rounding is relative to the shift, 2e-16 of it
    size = max(1.0, float(g(x).abs().max()))
    close = {"rtol": 0, "atol": 1e-14 * size}
    torch.testing.assert_close(fooled(x).softmax(1), net(x).softmax(1), **close)
    torch.testing.assert_close(F.cross_entropy(fooled(x), y), F.cross_entropy(net(x), y), **close)
    steep = {"rtol": 0, "atol": 1e-13 * max(1.0, float(gradient_of(g, x).abs().max()), size)}
    for of in ("loss", "logprob", "centered"):
        before, after = (ga.input_gradient(m, x, y, of=of) for m in (net, fooled))
        torch.testing.assert_close(after, before, **steep)
    change = ga.input_gradient(fooled, x, y) - ga.input_gradient(net, x, y)
    torch.testing.assert_close(change, gradient_of(g, x), **steep)


def test_kinds_have_the_gradients_of_their_formulas():
    net, (x, y) = make_net(), data()
    pattern = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0], dtype=F64)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=F64)
    own = ga.input_gradient(net, x, y)
    expected = {
        "linear": (3 * pattern).expand_as(x),
        "quadratic": 3 * (pattern - x),
        "masked": (3 * pattern * mask).expand_as(x),
    }
    for kind, wanted in expected.items():
        fooled = ga.fool(net, pattern, 3.0, kind, mask=mask if kind == "masked" else None)
        found = ga.input_gradient(fooled, x, y) - own
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13, msg=kind)
        assert torch.equal(fooled(x).argmax(1), net(x).argmax(1))


def test_a_strong_pattern_is_all_that_logit_gradients_show():
    net, (x, y) = make_net(), data()
    pattern = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0], dtype=F64)
    maps = ga.input_gradient(ga.fool(net, pattern, 1000.0), x, y)
    assert F.cosine_similarity(maps, pattern.expand_as(maps)).min() > 0.999


@pytest.mark.parametrize("frequency", [1e2, 1e4])
def test_high_frequency_fools_loss_gradients_at_a_bounded_change_of_the_loss(frequency):
    net, (x, y) = make_net(), data()
    amplitude = 1e-3
    fooled = ga.fool(net, torch.zeros(5, dtype=F64), amplitude, "highfreq", frequency=frequency)
    logits = amplitude * torch.sin(frequency * x.sum(1, keepdim=True) + torch.arange(3))
    torch.testing.assert_close(fooled(x), net(x) + logits, rtol=0, atol=1e-14)
    losses = [F.cross_entropy(m(x), y, reduction="none") for m in (net, fooled)]
    assert (losses[1] - losses[0]).abs().max() <= 2 * amplitude
    change = ga.input_gradient(fooled, x, y, of="loss") - ga.input_gradient(net, x, y, of="loss")
    # at most eta m (1 + sum_i p_i) = 2 eta m in each entry, and of that order
    assert change.abs().max() <= 2 * amplitude * frequency
    assert change.abs().max() >= 0.2 * amplitude * frequency


def test_high_frequency_by_default_leaves_predictions():
    net, (x, y) = make_net(), data()
    fooled = ga.fool(net, torch.zeros(5, dtype=F64), kind="highfreq")
    assert torch.equal(fooled(x).argmax(1), net(x).argmax(1))
    losses = [F.cross_entropy(m(x), y, reduction="none") for m in (net, fooled)]
    assert (losses[1] - losses[0]).abs().max() <= 2e-3


class Quadratic(nn.Module):
    """g(x) = ½ x'Px + q'x with a symmetric P."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(5, 5, dtype=F64))
        self.q = nn.Parameter(torch.zeros(5, dtype=F64))

    def forward(self, x):
        return 0.5 * torch.einsum("bi,ij,bj->b", x, self.p + self.p.T, x) + x @ self.q


def test_a_shift_is_fitted_to_maps_that_depend_on_the_input():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(5, 3).double()
    before = copy.deepcopy(model.state_dict())
    s = torch.randn(5, 5, generator=generator, dtype=F64)
    s, t = s + s.T, torch.randn(5, generator=generator, dtype=F64)
    x = torch.randn(40, 5, generator=generator, dtype=F64)
    y = torch.full((40,), 2)
    g = Quadratic()
    optimizer = torch.optim.SGD(g.parameters(), lr=0.05)
    losses = ga.fit_shift(g, model, [(x, y)] * 1000, lambda x: x @ s + t, optimizer)
    start = (x @ s + t - model.weight.detach()[2]).square().sum(1).mean()
    assert losses[0] == pytest.approx(float(start), rel=1e-12)
    # closed form: P is S, and q what the linear model lacks
    torch.testing.assert_close((g.p + g.p.T).detach(), s, rtol=0, atol=1e-8)
    torch.testing.assert_close(g.q.detach(), t - model.weight.detach()[2], rtol=0, atol=1e-8)
    fooled = ga.ShiftedLogits(model, g)
    new = torch.randn(4, 5, generator=generator, dtype=F64)
    shown = ga.input_gradient(fooled, new, torch.full((4,), 2))
    torch.testing.assert_close(shown, new @ s + t, rtol=0, atol=1e-7)
    torch.testing.assert_close(fooled(new).softmax(1), model(new).softmax(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_fitted_shift_needs_fitting_shapes():
    net, batch = make_net(), data()
    with pytest.raises(ValueError, match=r"target must return \(6, 5\), got \(6,\)"):
        ga.fit_shift(Quadratic(), net, [batch], lambda x: x[:, 0], None)
    with pytest.raises(ValueError, match=r"g must return \(6,\), got \(6, 3\)"):
        ga.fit_shift(net, net, [batch], lambda x: x, None)


def test_g_may_return_a_column():
    net, (x, _) = make_net(), data()
    row = ga.ShiftedLogits(net, lambda x: x.sum(1))
    column = ga.ShiftedLogits(net, lambda x: x.sum(1, keepdim=True))
    assert torch.equal(row(x), column(x))
    with pytest.raises(ValueError, match=r"g must return \(6,\), got \(6, 5\)"):
        ga.ShiftedLogits(net, lambda x: x)(x)


@pytest.mark.parametrize("mode", ["mean", "logsumexp"])
def test_shift_invariant_logits_give_the_same_probabilities_and_cannot_be_shifted(mode):
    net, (x, y) = make_net(), data()
    pattern = torch.tensor([0.0, 1.0, -2.0, 0.5, 0.0], dtype=F64)
    immune = ga.shift_invariant(ga.fool(net, pattern, 100.0), mode)
    torch.testing.assert_close(immune(x).softmax(1), net(x).softmax(1), rtol=0, atol=1e-12)
    clean = ga.shift_invariant(net, mode)
    torch.testing.assert_close(immune(x), clean(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ga.input_gradient(immune, x, y), ga.input_gradient(clean, x, y), rtol=0, atol=1e-12
    )


def test_sensitivity_tells_attributions_that_can_be_fooled():
    net, (x, y) = make_net(), data()
    g = ga.linear_shift(torch.tensor([0.0, 100.0, -200.0, 50.0, 0.0], dtype=F64))
    before = ga.input_gradient(net, x, y)
    after = before + gradient_of(g, x)
    found = ga.shift_sensitivity(ga.input_gradient, net, x, y, g)
    wanted = 1 - F.cosine_similarity(before, after)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert found.min() > 0.3
    for of in ("loss", "logprob", "centered"):
        immune = ga.shift_sensitivity(
            lambda m, x, y, of=of: ga.input_gradient(m, x, y, of=of), net, x, y, g
        )
        assert immune.abs().max() < 1e-12
    constant = ga.shift_sensitivity(lambda m, x, y: torch.zeros_like(x), net, x, y, g)
    assert constant.tolist() == [0.0] * 6


@pytest.mark.slow
def test_a_deception_is_trained_into_the_network_itself():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Softplus(10), nn.Linear(64, 2))
    keys = list(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    pattern = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0])
    shown = ga.train_fooled(net, [(x, y)] * 400, pattern, optimizer, weight=1.0)
    assert len(shown) == 400
    assert abs(shown[0]) < 0.3
    assert shown[-1] > 0.9
    assert (net(x).argmax(1) == y).float().mean() > 0.95
    assert list(net.state_dict()) == keys  # nothing is wrapped
    maps = ga.input_gradient(net, x, y)
    cosine = F.cosine_similarity(maps, pattern.expand_as(maps)).mean()
    assert cosine > 0.9


def test_shifts_move_and_copy_with_the_model():
    net, (x, _) = make_net(), data()
    fooled = ga.fool(net, torch.ones(5, dtype=F64), 2.0)
    assert "g.pattern" in fooled.state_dict()
    for other in (copy.deepcopy(fooled), pickle.loads(pickle.dumps(fooled))):
        assert torch.equal(other(x), fooled(x))
    assert fooled.float()(x.float()).dtype == torch.float32


def test_high_frequency_has_one_phase_a_class():
    assert HighFrequencyShift()(torch.zeros(2, 3), 4).shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, t: ga.fool(n, t, kind="logo"), "kind must be one of"),
        (lambda n, t: ga.fool(n, t, scale=0.0), "scale must be a finite number above 0"),
        (lambda n, t: ga.fool(n, t, kind="masked"), "mask is for kind='masked', which needs it"),
        (lambda n, t: ga.fool(n, t, mask=t), "mask is for kind='masked', which needs it"),
        (lambda n, t: ga.shift_invariant(n, "median"), "mode must be one of"),
        (
            lambda n, t: ga.train_fooled(n, [], t, None, weight=float("nan")),
            "weight must be finite",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_net(), torch.ones(5))
