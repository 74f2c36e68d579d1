"""MutualInformation: truth, errors, null, saturation, bad input; batched networks equal single ones."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from mi_surrogates.errors import DegenerateData
from mi_surrogates.information import MutualInformation, mutual_information
from mi_surrogates.information.estimator import BatchedEstimator, Frame, Settings, all_pairs
from mi_surrogates.information.networks import (
    BatchedMLP,
    Decoder,
    JointCritic,
    PaperCritic,
    Reconstruction,
)
from mi_surrogates.problems import uniform_information
from mi_surrogates.problems.channels import uniform_noise


def gaussian(rho: float, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = torch.randn(2, n, 1, generator=torch.Generator().manual_seed(seed))
    return x, rho * x + math.sqrt(1 - rho**2) * noise


FAST = {"hidden": (32, 32), "max_steps": 400, "batch_size": 128}
BIAS = {"infonce": 0.06}  # its bias at the optimum is of order e^I / B


@pytest.mark.parametrize(
    "method", ["mine", "nwj", "infonce", "js", "smile", "ba", "ksg", "gaussian"]
)
def test_every_method_finds_the_information_of_a_gaussian(method: str) -> None:
    est = mutual_information(*gaussian(0.9, 4000), method, **FAST)
    assert est.stderr > 0
    # learned bounds fall short by what the network cannot represent, at most 0.04 here
    slack = BIAS.get(method, 0.0) + (0.0 if method in ("ksg", "gaussian") else 0.04)
    assert -3 * est.stderr - slack < est.value - 0.830366 < 3 * est.stderr
    assert not est.saturated
    assert est.bound == ("lower" if method in ("mine", "nwj", "infonce", "js") else "none")


@pytest.mark.parametrize("method", ["mine", "nwj", "ksg", "gaussian"])
def test_standard_error_is_the_spread_over_samples(method: str) -> None:
    """Twelve independent scores of one fitted estimator; their deviation has a 21 % error itself."""
    mi = MutualInformation(method, hidden=(16,), max_steps=150, batch_size=128)
    mi.fit(*gaussian(0.8, 1000, 99))
    scores = [mi.score(*gaussian(0.8, 500, seed)) for seed in range(24)]
    spread = float(np.std([s.value for s in scores], ddof=1))
    claimed = float(np.mean([s.stderr for s in scores]))
    assert 0.55 < claimed / spread < 1.8  # χ² with 23 degrees of freedom: 3 deviations are ±45 %


def test_barber_agakov_on_a_linear_gaussian_is_entropy_minus_cross_entropy() -> None:
    x, y = gaussian(0.9, 4000)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    mi = MutualInformation("ba", hidden=(8,), max_steps=600, x_entropy=entropy, dtype=torch.float64)
    est = mi.fit(x[:2000], y[:2000]).score(x[2000:], y[2000:])
    slope = float((x[:2000] * y[:2000]).mean() / y[:2000].square().mean())
    variance = float((x[:2000] - slope * y[:2000]).square().mean())
    residual = (x[2000:] - slope * y[2000:]).double()
    cross = 0.5 * math.log(2 * math.pi * variance) + float(residual.square().mean()) / 2 / variance
    assert est.bound == "lower"
    # the network fits the same linear Gaussian up to its small non-linear part
    assert est.value == pytest.approx(entropy - cross, abs=0.015)


def test_linear_decoder_is_the_exact_affine_function_of_the_log_error() -> None:
    """With hidden=() and its best variance the decoder's value is H(X) − ½ log(2πe MSE)."""
    x, y = gaussian(0.9, 2000)
    settings = Settings("ba", hidden=(), x_entropy=1.4189385, lr=0.02, patience=1000)
    estimator = BatchedEstimator(settings, 1, 1, dtype=torch.float64)
    estimator.fit(x[None], y[None], steps=1500)
    value = estimator.evaluate(x[None], y[None])[0].item()
    solved = np.linalg.lstsq(np.c_[y, np.ones(2000)], x.numpy(), rcond=None)
    mse = float(solved[1][0]) / 2000
    # the decoder's log-scale is linear in y: a little more freedom than the constant variance; 1e-4 of
    # the mixture's weight goes to its broad component, and training leaves the last 1e-3
    assert value == pytest.approx(1.4189385 - 0.5 * math.log(2 * math.pi * math.e * mse), abs=3e-3)


def test_bits_are_nats_over_log_two() -> None:
    x, y = gaussian(0.9, 500)
    nats, bits = (mutual_information(x, y, units=units) for units in ("nats", "bits"))
    assert bits.value == pytest.approx(nats.value / math.log(2), rel=1e-12)
    assert bits.stderr == pytest.approx(nats.stderr / math.log(2), rel=1e-12)


def test_categorical_decoder_knows_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, (4000, 1), generator=generator).float()
    y = torch.where(torch.rand(4000, 1, generator=generator) < 0.5, x, torch.zeros(()))
    # y is x with probability ½, else 0: H(X) − H(X|Y)
    p_zero = 0.25 + 0.75 * 0.5
    posterior = np.array([0.25, 0.125, 0.125, 0.125]) / p_zero
    truth = math.log(4) + p_zero * float((posterior * np.log(posterior)).sum())
    est = mutual_information(x, y, "ba", classes=4, x_entropy=math.log(4), **FAST)
    assert est.value == pytest.approx(truth, abs=3 * est.stderr + 0.01)
    assert mutual_information(x, y, "ba", classes=4, **FAST).value == pytest.approx(
        est.value, abs=0.01
    )
    with pytest.raises(ValueError, match="labels 0"):
        mutual_information(x - 1, y, "ba", classes=4)


def test_mixture_decoder_beats_a_gaussian_on_two_branches() -> None:
    generator = torch.Generator().manual_seed(0)
    y, sign = torch.rand(4000, 1, generator=generator), torch.randn(4000, 1, generator=generator)
    x = sign.sign() * y + 0.05 * torch.randn(4000, 1, generator=generator)
    one, two = (
        mutual_information(x, y, "ba", components=k, x_entropy=1.0, **FAST).value for k in (1, 2)
    )
    assert two > one + 0.3


def test_output_tanh_caps_the_estimate_at_two_nats() -> None:
    x, y = gaussian(0.9999, 6000)
    capped = mutual_information(x, y, "mine", output_activation="tanh", **FAST)
    free = mutual_information(x, y, "mine", **FAST)
    assert capped.value < 2 < free.value < 4.259


def test_paper_critic_estimates() -> None:
    x, y = gaussian(0.9, 3000)
    est = mutual_information(x, y, "mine", critic="paper", max_steps=300, batch_size=128)
    assert est.value == pytest.approx(0.830366, abs=0.1)


def test_value_above_the_log_of_the_events_is_flagged() -> None:
    x, y = gaussian(0.9999999, 200)
    with pytest.warns(UserWarning, match="more than a bound of this kind can show"):
        est = mutual_information(x, y, "ksg", k=1)
    assert est.saturated
    assert est.value > math.log(200) - 1
    block = Settings("infonce", batch_size=64)
    assert BatchedEstimator(block, 1, 1).limit(1000) == pytest.approx(math.log(64) - 1)
    assert BatchedEstimator(Settings("ba"), 1, 1).limit(10) == math.inf


def test_null_tells_dependence_from_independence() -> None:
    x, y = gaussian(0.5, 400)
    assert mutual_information(x, y).null(19).p_value == 0.05
    unrelated = gaussian(0.0, 400, 5)[1]
    null = mutual_information(
        x, unrelated, "mine", hidden=(8,), max_steps=50, batch_size=64, units="bits"
    ).null(9)
    assert null.p_value > 0.05
    assert abs(null.bias) < 3 * float(null.values.std())
    with pytest.raises(ValueError, match="n must be"):
        mutual_information(x, y).null(0)


def test_rank_transform_rescues_ksg_from_heavy_tails() -> None:
    x, y = gaussian(0.9, 1000)
    heavy_x, heavy_y = (torch.sinh(4 * v.double()) for v in (x, y))
    plain = mutual_information(heavy_x, heavy_y).value
    ranked = mutual_information(heavy_x, heavy_y, transform="rank").value
    assert abs(ranked - 0.830366) < 0.1 < abs(plain - 0.830366)
    learned = mutual_information(heavy_x, heavy_y, "mine", transform="rank", **FAST).value
    assert learned == pytest.approx(0.83, abs=0.15)


def test_uniform_noise_problem() -> None:
    for epsilon in (0.1, 0.75):
        est = mutual_information(*uniform_noise(np.array([epsilon]), 4000, 0))
        # KSG smooths the sharp edges of the uniform density: a bias of about 0.05 at ε = 0.1
        assert est.value == pytest.approx(uniform_information(epsilon), abs=3 * est.stderr + 0.05)


def test_held_out_curve_stops_training_of_noise() -> None:
    x, _ = gaussian(0.9, 300)
    est = mutual_information(x, x.roll(1, 0), "mine", max_steps=3000, check_every=20, batch_size=64)
    assert len(est.curve) < 100
    assert est.converged
    assert est.value < 0.2  # the training value would be far above


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: mutual_information(x, y, "kraskov"), ValueError, "mine, nwj, infonce"),
        (lambda x, y: mutual_information(x, y, units="dB"), ValueError, "units"),
        (lambda x, y: mutual_information(x, y, "mine", holdout=1.0), ValueError, "holdout"),
        (lambda x, y: mutual_information(x[:40], y[:40], "mine"), ValueError, "at least 50 events"),
        (lambda x, y: mutual_information(x, y, "mine", batch_size=80), ValueError, "batch_size 80"),
        (lambda x, y: mutual_information(x, y[:7]), ValueError, "100 events and y has 7"),
        (lambda x, y: mutual_information(x[:1], y[:1]), ValueError, "at least 2 events"),
        (lambda x, y: mutual_information(x, y * math.nan), ValueError, "y has NaN"),
        (lambda x, y: mutual_information(x, y.to(torch.complex64)), ValueError, "real numbers"),
        (lambda x, y: mutual_information(x.numpy() + 1j, y), ValueError, "real numbers"),
        (lambda x, y: mutual_information(np.array(["a"] * 100), y), ValueError, "real numbers"),
        (
            lambda x, y: mutual_information(torch.tensor(1.0), y),
            ValueError,
            "one row for each event",
        ),
        (lambda x, y: mutual_information(x * 0, y), DegenerateData, "x is the same"),
        (lambda x, y: mutual_information(x, y * 0), DegenerateData, "y is the same"),
        (lambda x, y: mutual_information(x, y, critic="deep"), ValueError, "critic"),
        (lambda x, y: mutual_information(x, y, transform="log"), ValueError, "transform"),
        (lambda x, y: mutual_information(x, y, ema=2.0), ValueError, "ema"),
        (lambda x, y: mutual_information(x, y, validation=0.0), ValueError, "validation"),
        (lambda x, y: mutual_information(x, y, k=0), ValueError, "k must be"),
        (lambda x, y: mutual_information(x, y, lr=0.0), ValueError, "lr and tau"),
        (lambda x, y: MutualInformation("ksg").score(x, y), RuntimeError, "call fit"),
        (lambda x, y: JointCritic(1, 1, output_activation="cosh"), ValueError, "activation"),
    ],
)
def test_bad_input_is_named(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call(*gaussian(0.9, 100))


def test_batched_networks_are_single_networks() -> None:
    """M networks in one product against a loop of torch.nn layers with the same weights."""
    generator = torch.Generator().manual_seed(0)
    net = BatchedMLP(
        [2, 3], [5, 4], 1, groups=4, act="silu", generator=generator, dtype=torch.float64
    )
    a, b = (torch.randn(4, 10, d, generator=generator, dtype=torch.float64) for d in (2, 3))
    out = net(a, b)
    for m in range(4):
        h = torch.cat([a[m], b[m]], 1)
        weights = [torch.cat([w[m] for w in net.first]), *(w[m] for w in net.weights)]
        for i, (weight, bias) in enumerate(zip(weights, net.biases, strict=True)):
            layer = nn.Linear(*weight.shape, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(weight.T)
                layer.bias.copy_(bias[m, 0])
            h = layer(nn.functional.silu(h) if i else h)
        assert torch.allclose(out[m], h, atol=1e-12)


def test_training_m_critics_as_one_is_training_each() -> None:
    x, y = torch.randn(3, 60, 1), torch.randn(3, 60, 2)
    both = JointCritic(1, 2, hidden=(8,), groups=3, generator=torch.Generator().manual_seed(0))
    singles = [JointCritic(1, 2, hidden=(8,)) for _ in range(3)]
    for m, single in enumerate(singles):
        state = {k: v[m : m + 1] for k, v in both.state_dict().items()}
        single.load_state_dict(state)
    nets = [(both, slice(None)), *((s, slice(m, m + 1)) for m, s in enumerate(singles))]
    for net, part in nets:
        adam = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(20):
            loss = (net(x[part], y[part]) - 1).square().mean(1).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
    for m, single in enumerate(singles):
        assert torch.allclose(both(x, y)[m], single(x[m : m + 1], y[m : m + 1])[0], atol=1e-6)


def test_one_shared_network_for_one_design_is_the_plain_one() -> None:
    x, y = gaussian(0.9, 400)
    values = []
    for groups in (1, 1):
        estimator = BatchedEstimator(
            Settings("mine", hidden=(8,), batch_size=32),
            1,
            1,
            groups=groups,
            generator=torch.Generator().manual_seed(3),
        )
        estimator.fit(x[None, :200], y[None, :200], steps=60)
        values.append(estimator.evaluate(x[None, 200:], y[None, 200:])[0].item())
    assert values[0] == values[1]


@pytest.mark.parametrize(
    "net",
    [
        JointCritic(1, 2, 3, hidden=(8,)),
        PaperCritic(1, 2, 3),
        Decoder(1, 2, 3, hidden=(8,), components=2),
    ],
)
def test_critics_round_trip_and_compile(net: nn.Module) -> None:
    x, y, theta = torch.randn(4, 5, 1), torch.randn(4, 5, 2), torch.randn(4, 3)
    expected = net(x, y, theta)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x, y, theta), expected)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, y, theta), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(net(x, y, theta).float(), expected, atol=0.3)


@pytest.mark.parametrize(
    "net",
    [
        JointCritic(1, 2, 3, hidden=(8,), dtype=torch.float64),
        PaperCritic(1, 2, 3, dtype=torch.float64),
        Decoder(1, 2, 3, hidden=(8,), dtype=torch.float64),
    ],
)
def test_reexpressed_designs_leave_the_function_as_it_was(net) -> None:
    x, y, theta = (torch.randn(*s, dtype=torch.float64) for s in ((4, 5, 1), (4, 5, 2), (4, 3)))
    before = net(x, y, theta)
    scale, shift = torch.tensor([2.0, 0.5, 3.0]), torch.tensor([1.0, -4.0, 0.3])
    net.change_theta(scale, shift)
    assert torch.allclose(net(x, y, (theta - shift) / scale), before, atol=1e-10)


def test_reconstruction_reexpresses_its_designs_too() -> None:
    y, theta = torch.randn(4, 5, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for gated in (False, True):
        net = Reconstruction(1, 2, 3, gated=gated, dtype=torch.float64)
        before = net(y, theta)
        net.change_theta(torch.full((3,), 2.0), torch.ones(3))
        assert torch.allclose(net(y, (theta - 1) / 2), before, atol=1e-10)


def test_all_pairs_are_every_x_with_every_y() -> None:
    net = JointCritic(1, 1, hidden=(8,))
    x, y = torch.randn(2, 4, 1), torch.randn(2, 4, 1)
    scores = all_pairs(net, x, y, None)
    for i in range(4):
        for j in range(4):
            single = net(x[:, i : i + 1], y[:, j : j + 1])[:, 0]
            assert torch.allclose(scores[:, i, j], single, atol=1e-6)


def test_pairs_are_permuted_within_a_design_only() -> None:
    """Designs that differ in y alone: permuting across them would see information that is not there."""
    x = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0))
    y = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(1)) + torch.tensor(
        [[[0.0]], [[9.0]]]
    )
    estimator = BatchedEstimator(Settings("mine", hidden=(16,), standardize=False), 1, 1, 1)
    theta = torch.tensor([[0.0], [1.0]])
    estimator.fit(x[:, :250], y[:, :250], theta, steps=150)
    value, stderr = estimator.evaluate(x[:, 250:], y[:, 250:], theta)
    assert bool((value < 3 * stderr + 0.02).all())


def test_frame_by_design_has_the_moments_of_the_design() -> None:
    values = torch.randn(3, 200, 2) * torch.tensor([[[1.0]], [[5.0]], [[9.0]]]) + 4
    framed = Frame(values, by_design=True)(values)
    assert torch.allclose(framed.mean(1), torch.zeros(3, 2), atol=1e-5)
    assert torch.allclose(framed.std(1, unbiased=False), torch.ones(3, 2), atol=1e-5)
    constant = Frame(torch.ones(1, 5, 1), by_design=True)(torch.full((1, 1, 1), 3.0))
    assert constant.item() == 2.0
