from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_net
from torch import nn

import gradient_alignment as ga

F64 = torch.float64


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3).double()


def test_linear_logits_give_the_closed_form_trajectory():
    """x_t - c - w/d = (1 - lr d)^t (x_0 - c - w/d) with slope w and decay d, while no bound is met."""
    model, y = linear(), torch.tensor([0, 2, 1])
    start = torch.rand(3, 4, dtype=F64)
    lr, decay, center, steps = 0.05, 0.7, 0.4, 30
    x, path = ga.sample(
        model,
        y,
        steps=steps,
        lr=lr,
        weight_decay=decay,
        center=center,
        init=start,
        clip=(-100.0, 100.0),
        return_path=True,
    )
    goal = center + model.weight[y].detach() / decay
    for t in range(steps + 1):
        wanted = goal + (1 - lr * decay) ** t * (start - goal)
        torch.testing.assert_close(path[t], wanted, rtol=0, atol=1e-13)
    assert torch.equal(path[-1], x)


def test_without_decay_and_noise_it_is_gradient_ascent_with_projection(net):
    y, start = torch.tensor([0, 1]), torch.rand(2, 5, dtype=F64)
    found = ga.sample(net, y, steps=20, lr=0.3, weight_decay=0.0, init=start)
    x = start.clone()
    for _ in range(20):
        point = x.clone().requires_grad_()
        value = net(point)[torch.arange(2), y].sum()
        x = (x + 0.3 * torch.autograd.grad(value, point)[0]).clamp(0, 1)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-14)
    assert ((found == 0) | (found == 1)).any()


def test_samples_stay_in_the_box_at_every_step():
    model, y = linear().float(), torch.tensor([0, 1])
    _, path = ga.sample(
        model, y, steps=40, lr=1.0, noise=0.5, clip=(-0.2, 0.6), shape=(4,), return_path=True
    )
    assert path.shape == (41, 2, 4)
    assert path.min() >= -0.2
    assert path.max() <= 0.6


def test_a_start_outside_the_box_is_clipped():
    start = torch.tensor([[5.0, -5.0, 0.5, 0.2]], dtype=F64)
    _, path = ga.sample(linear(), torch.tensor([0]), steps=1, init=start, return_path=True)
    assert path[0].tolist() == [[1.0, 0.0, 0.5, 0.2]]
    assert start[0, 0] == 5.0


def test_seeded_samples_repeat_and_runs_can_be_resumed():
    model, y = linear().float(), torch.tensor([0, 1, 2])

    def run(steps: int, generator: torch.Generator, init: object = "gaussian") -> torch.Tensor:
        return ga.sample(
            model, y, steps=steps, noise=0.01, shape=(4,), init=init, generator=generator
        )

    whole = run(10, torch.Generator().manual_seed(4))
    assert torch.equal(whole, run(10, torch.Generator().manual_seed(4)))
    assert not torch.equal(whole, run(10, torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(4)
    half = run(6, generator)
    saved = generator.get_state()
    again = torch.Generator()
    again.set_state(saved)
    assert torch.equal(run(4, again, half), whole)


def test_the_gaussian_start_has_the_stated_moments():
    model = nn.Linear(1000, 2)
    _, path = ga.sample(
        model,
        torch.zeros(20, dtype=torch.long),
        steps=1,
        shape=(1000,),
        clip=(-9.0, 9.0),
        generator=torch.Generator().manual_seed(0),
        return_path=True,
    )
    # 20,000 draws: standard errors 0.0014 and 0.001
    assert path[0].mean().item() == pytest.approx(0.5, abs=0.007)
    assert path[0].std().item() == pytest.approx(0.2, abs=0.005)


def test_langevin_noise_has_the_stationary_variance():
    """A flat logit with decay d is an AR(1) process: variance 2 lr T / (1 - (1 - lr d)^2)."""
    model = nn.Linear(2000, 2)
    nn.init.zeros_(model.weight)
    lr, decay, temperature = 0.1, 2.0, 0.05
    x = ga.sample(
        model,
        torch.zeros(10, dtype=torch.long),
        steps=60,
        lr=lr,
        weight_decay=decay,
        noise=temperature,
        clip=(-9.0, 9.0),
        shape=(2000,),
        generator=torch.Generator().manual_seed(0),
    )
    wanted = 2 * lr * temperature / (1 - (1 - lr * decay) ** 2)
    # 20,000 draws: relative standard error sqrt(2/20000) = 1 %
    assert x.var().item() == pytest.approx(wanted, rel=0.05)
    assert x.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(wanted / 20000))


def test_without_projection_x_roams_and_the_model_sees_it_clipped():
    model, y = linear(), torch.tensor([1])
    start = torch.full((1, 4), 0.5, dtype=F64)
    _, path = ga.sample(
        model,
        y,
        steps=5,
        lr=10.0,
        weight_decay=0.0,
        init=start,
        project=False,
        return_path=True,
    )
    slope = model.weight[1].detach()
    first = 0.5 + 10 * slope
    torch.testing.assert_close(path[1, 0], first, rtol=0, atol=1e-13)
    inside = (first >= 0) & (first <= 1)
    assert not inside.all()
    # outside of the box nothing pulls
    torch.testing.assert_close(path[2, 0], first + 10 * slope * inside, rtol=0, atol=1e-13)
    final = ga.sample(model, y, steps=1, lr=10.0, weight_decay=0.0, init=start, project=False)
    torch.testing.assert_close(final[0], first.clamp(0, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer of at least 1"),
        ({"lr": -0.1}, ValueError, "lr must be a finite number of at least 0"),
        ({"noise": math.nan}, ValueError, "noise must be a finite number"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be a finite number"),
        ({"clip": (1.0, 0.0)}, ValueError, "clip must be"),
        ({"shape": None}, ValueError, "shape is needed"),
        ({"init": "uniform"}, ValueError, "init must be 'gaussian' or a tensor"),
        ({"init": torch.zeros(3, 4)}, ValueError, "init has 3 images, y has 2 labels"),
        ({"init": torch.zeros(2, 4, dtype=torch.uint8)}, TypeError, "convert to float"),
    ],
)
def test_bad_arguments_of_the_sampler(arguments, error, message):
    with pytest.raises(error, match=message):
        ga.sample(linear().float(), torch.tensor([0, 1]), **{"shape": (4,), **arguments})


def test_gan_test_counts_the_judges_verdicts():
    model = linear().float()

    def judge(x: torch.Tensor) -> np.ndarray:  # as scikit-learn's predict
        return np.where(x[:, 0].numpy() >= 0, 1, 1)

    labels = torch.tensor([0, 1, 1, 2, 1])
    found = ga.gan_test(model, judge, labels=labels, steps=2, shape=(4,), batch_size=2)
    assert found.accuracy == 0.6
    assert found.per_class.tolist() == [0.0, 1.0, 0.0]
    assert found.samples.shape == (5, 4)
    assert torch.equal(found.labels, labels)


def test_a_classifier_is_its_own_best_judge_and_batches_do_not_matter():
    model = linear().float()
    start = torch.rand(9, 4)
    runs = [
        ga.gan_test(model, model, num_samples=9, num_classes=3, init=start, batch_size=size)
        for size in (9, 4)
    ]
    assert torch.equal(runs[0].labels, torch.arange(9) % 3)
    assert torch.equal(runs[0].samples, runs[1].samples)
    right = model(runs[0].samples).argmax(1) == runs[0].labels
    assert runs[0].accuracy == pytest.approx(right.double().mean().item())
    assert runs[0].per_class.mean().item() == pytest.approx(runs[0].accuracy)
    assert (
        ga.gan_test(model, model, labels=torch.tensor([0]), num_classes=2, init=start[:1])
        .per_class[1]
        .isnan()
    )


@pytest.mark.parametrize("shape", [(3, 1), (1,), (3, 2, 2), (2, 5)])
def test_verdicts_of_another_shape_are_refused(shape):
    labels = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"judge must return \(3, C\) logits or \(3,\) classes"):
        ga.gan_test(linear().float(), lambda x: torch.zeros(shape), labels=labels, shape=(4,))


def test_models_in_double_precision_are_sampled(net):
    y = torch.tensor([0, 1, 2])
    found = ga.sample(net, y, shape=(5,), steps=1, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    start = (0.5 + 0.2 * noise).clamp(0, 1)
    point = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(point)[torch.arange(3), y].sum(), point)
    expected = (start + 0.1 * (slope - 0.01 * (start - 0.5))).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gan_test_needs_labels_or_their_number():
    with pytest.raises(ValueError, match="labels is empty"):
        ga.gan_test(linear(), linear(), labels=torch.tensor([], dtype=torch.long), shape=(4,))
    with pytest.raises(ValueError, match="pass labels or num_classes"):
        ga.gan_test(linear(), linear())
    with pytest.raises(ValueError, match="batch_size"):
        ga.gan_test(linear(), linear(), num_classes=2, batch_size=0)


def test_density_ratio_of_a_quadratic_is_its_expectation():
    """f = -a/2 |x|^2: the mean of f(x + s z) - f(x) is -a s^2 D / 2."""

    class Quadratic(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -0.5 * x.square().sum(1, keepdim=True) * torch.tensor([1.0, 3.0], dtype=F64)

    x = torch.zeros(400, 50, dtype=F64)
    y = torch.arange(400) % 2
    loader = list(zip(x.split(150), y.split(150), strict=True))
    found = ga.density_ratio(
        Quadratic(), loader, [0.1, 2.0], num_noise=5, generator=torch.Generator().manual_seed(0)
    )
    # relative standard error of a chi-square sum with 100,000 degrees: 0.45 %, more for the mixture
    wanted = torch.tensor([-0.5 * 2 * s * s * 50 for s in (0.1, 2.0)], dtype=F64)
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0)


def test_density_ratio_of_a_linear_model_with_known_noise():
    model, x, y = linear(), torch.rand(3, 4, dtype=F64), torch.tensor([0, 1, 2])
    found = ga.density_ratio(model, [(x, y)], [0.5], generator=torch.Generator().manual_seed(1))
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    wanted = 0.5 * (model.weight[y] * noise).sum(1).mean()
    torch.testing.assert_close(found[0], wanted.detach(), rtol=0, atol=1e-13)


def test_density_ratio_is_not_rounded_by_autocast(net, batch):
    x, y = batch
    net, x = net.float(), x.float()

    def ratio():
        return ga.density_ratio(net, [(x, y)], [0.01], generator=torch.Generator().manual_seed(0))

    expected = ratio()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ratio(), expected)


def test_bad_arguments_of_density_ratio(net, batch):
    with pytest.raises(ValueError, match="the loader is empty"):
        ga.density_ratio(net, [], [0.1])
    with pytest.raises(ValueError, match="scales must be a finite number above 0"):
        ga.density_ratio(net, [batch], [0.1, 0.0])
    with pytest.raises(ValueError, match="num_noise"):
        ga.density_ratio(net, [batch], [0.1], num_noise=0)


class Scores(nn.Module):
    """Logits -|x - mu_i|^2 / 2, whose gradients point to the class means."""

    def __init__(self, means: torch.Tensor) -> None:
        super().__init__()
        self.means = means

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -0.5 * torch.cdist(x, self.means).square()


def test_alignment_with_class_means_is_one_for_the_gaussian_classifier():
    x = torch.randn(20, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % 2
    means = torch.stack([x[y == k].mean(0) for k in range(2)])
    found = ga.alignment(Scores(means), x, y)
    torch.testing.assert_close(found, torch.ones(20, dtype=F64), rtol=0, atol=1e-9)
    swapped = ga.alignment(make_net(features=3), x, y)
    assert swapped.abs().max() <= 1


@pytest.mark.parametrize("given", [False, True])
def test_alignment_with_kernel_density_is_the_cosine_with_its_score(given):
    source = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 12, 3, dtype=F64, generator=source)
    y, net = torch.arange(12) % 3, make_net(features=3)
    data = (other, y) if given else None
    found = ga.alignment(net, x, y, "kde", data=data, bandwidth=0.8)
    slopes = ga.input_gradient(net, x, y)
    for b in range(12):
        kernels = [
            k for i, k in enumerate(other if given else x) if y[i] == y[b] and (given or i != b)
        ]
        point = x[b].clone().requires_grad_()
        squares = torch.stack([(point - k).square().sum() for k in kernels])
        (score,) = torch.autograd.grad(torch.logsumexp(-squares / (2 * 0.8**2), 0), point)
        wanted = torch.nn.functional.cosine_similarity(slopes[b], score, dim=0)
        torch.testing.assert_close(found[b], wanted, rtol=0, atol=1e-10)


def test_bad_arguments_of_alignment(net, batch):
    x, y = batch
    with pytest.raises(ValueError, match="reference must be one of"):
        ga.alignment(net, x, y, "median")
    with pytest.raises(ValueError, match="bandwidth"):
        ga.alignment(net, x, y, bandwidth=0.0)
    with pytest.raises(ValueError, match="class 0 has too few data"):
        ga.alignment(net, x, y, "kde")
