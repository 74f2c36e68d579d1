"""The regularisers against Eq. 4 by hand; one pass for all; batch norm, dropout, modes, precision, copies."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle

import pytest
import torch
from conftest import F64, exact_hessians, make_net
from torch import Tensor, nn
from torch.nn import functional as F

import gradient_alignment as ga
from gradient_alignment.core.modes import active_norms
from gradient_alignment.core.noise import directions


def by_hand(net, x, y, noise, sigma, *, controlled):
    """h, ½‖∇f‖² of Eq. 4 for every sample, one sample and one draw at a time."""
    h, size = [], []
    for b, label in enumerate(y):
        point = x[b : b + 1].clone().requires_grad_()
        value = net(point)[0, label]
        (slope,) = torch.autograd.grad(value, point, create_graph=True)
        draws = []
        for v in noise[:, b : b + 1]:
            change = net(point + sigma * v)[0, label] - value
            if controlled:
                change = change - sigma * (slope * v).sum()
            draws.append(2 / sigma**2 * change)
        h.append(torch.stack(draws).mean())
        size.append(0.5 * slope.square().sum())
    return torch.stack(h), torch.stack(size)


def gradients(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("estimator", ["taylor", "taylor-cv"])
def test_score_matching_is_equation_4(estimator, net, batch):
    x, y = batch
    kind = "gaussian" if estimator == "taylor" else "rademacher"
    noise = directions(x, 3, kind, torch.Generator().manual_seed(7))
    h, size = by_hand(net, x, y, noise, 0.1, controlled=estimator == "taylor-cv")
    expected = 0.3 * (h.mean() + size.mean() + 0.02 * h.square().mean())
    generator = torch.Generator().manual_seed(7)
    regularizer = ga.ScoreMatching(0.3, 0.02, estimator, 0.1, 3, generator=generator)
    found = regularizer(net, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(net, found), gradients(net, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    terms = regularizer.terms
    torch.testing.assert_close(terms["trace"], h.mean().detach())
    torch.testing.assert_close(terms["gradient"], size.mean().detach())
    torch.testing.assert_close(terms["stability"], h.square().mean().detach())
    assert terms["nonfinite"] == 0
    assert not any(value.requires_grad for value in terms.values())


def test_anti_score_matching_stops_at_the_threshold(net, batch):
    x, y = batch
    noise = directions(x, 1, "rademacher", torch.Generator().manual_seed(7))
    h, _ = by_hand(net, x, y, noise, 0.1, controlled=True)
    threshold = float(h.detach().sort().values[1:3].mean())  # between two samples
    expected = -0.5 * torch.minimum(h, torch.tensor(threshold, dtype=F64)).mean()
    generator = torch.Generator().manual_seed(7)
    regularizer = ga.AntiScoreMatching(0.5, threshold, sigma=0.1, generator=generator)
    found = regularizer(net, x, y)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(net, found), gradients(net, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert regularizer.terms["above"] == (h > threshold).sum()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("of", ["label", "loss", "logprob", "predicted", "logsumexp"])
def test_gradient_norm_is_its_formula(p, of, net, batch):
    x, y = batch
    functions = {
        "label": lambda f, c: f[c],
        "loss": lambda f, c: -f.log_softmax(0)[c],
        "logprob": lambda f, c: f.log_softmax(0)[c],
        "predicted": lambda f, c: f.max(),
        "logsumexp": lambda f, c: f.logsumexp(0),
    }
    sizes = []
    for sample, label in zip(x, y, strict=True):
        slope = torch.autograd.functional.jacobian(
            lambda s, c=label: functions[of](net(s[None])[0], c), sample
        )
        sizes.append(slope.abs().pow(p).sum() / p)
    found = ga.GradientNorm(0.7, of=of, p=p)(net, x, y)
    torch.testing.assert_close(found, 0.7 * torch.stack(sizes).mean(), rtol=1e-12, atol=1e-12)


def test_regularized_loss_is_the_sum_of_its_parts(net, batch):
    x, y = batch
    parts = [
        lambda: ga.ScoreMatching(generator=torch.Generator().manual_seed(1)),
        lambda: ga.AntiScoreMatching(generator=torch.Generator().manual_seed(2)),
        lambda: ga.GradientNorm(of="loss"),
    ]
    expected = F.cross_entropy(net(x), y) + sum(part()(net, x, y) for part in parts)
    loss_fn = ga.RegularizedLoss(net, *(part() for part in parts))
    found = loss_fn(x, y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(net, found), gradients(net, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss_fn.logits, net(x).detach())
    assert "ScoreMatching.trace" in loss_fn.terms
    assert torch.equal(ga.RegularizedLoss(net)(x, y), F.cross_entropy(net(x), y))


class Counting(nn.Module):
    """Counts the samples that pass through a network."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, []

    def forward(self, x):
        self.passes.append(len(x))
        return self.inner(x)


def test_one_clean_pass_and_one_noisy_pass_serve_all(net, batch):
    x, y = batch
    model = Counting(net)
    loss_fn = ga.RegularizedLoss(model, ga.ScoreMatching(num_samples=5), ga.GradientNorm())
    loss_fn(x, y).backward()
    assert model.passes == [4, 20]
    model.passes.clear()
    ga.RegularizedLoss(model, ga.ScoreMatching(num_samples=5, chunk=2))(x, y)
    assert model.passes == [4, 8, 8, 4]


def test_given_logits_save_the_pass(net, batch):
    x, y = batch
    model = Counting(net)
    point = x.clone().requires_grad_()
    logits = model(point)
    found = ga.GradientNorm()(model, point, y, logits=logits)
    assert model.passes == [4]
    torch.testing.assert_close(found, ga.GradientNorm()(net, x, y))
    with pytest.raises(ValueError, match="required a gradient"):
        ga.GradientNorm()(model, x, y, logits=logits)


def normed(seed=0, **options):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, **options), nn.Softplus(2.0)]
    layers += [nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6, **options), nn.Softplus(2.0)]
    return nn.Sequential(*layers, nn.Linear(6, 3)).double()


def image_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, 4, 4, generator=generator, dtype=F64), torch.arange(8) % 3


def statistics(net):
    return {name: value.clone() for name, value in net.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bn", ["shared", "frozen"])
def test_running_statistics_move_once_as_without_a_regularizer(bn, momentum):
    x, y = image_batch()
    net, plain = normed(momentum=momentum), normed(momentum=momentum)
    for _ in range(3):
        plain(x)
        regularizers = [ga.ScoreMatching(num_samples=2, bn=bn), ga.GradientNorm(bn=bn)]
        ga.RegularizedLoss(net, *regularizers)(x, y).backward()
    for name, value in statistics(plain).items():
        torch.testing.assert_close(statistics(net)[name], value, rtol=1e-12, atol=1e-12)
    assert all(m.training for m in net.modules())


def test_batch_mode_moves_statistics_at_every_pass_as_published():
    x, y = image_batch()
    net, plain = normed(), normed()
    generator = torch.Generator().manual_seed(5)
    regularizer = ga.ScoreMatching(
        estimator="taylor", num_samples=3, bn="batch", generator=generator
    )
    found = ga.RegularizedLoss(net, regularizer)(x, y)
    noise = directions(x, 3, "gaussian", torch.Generator().manual_seed(5))
    point = x.clone().requires_grad_()
    logits = plain(point)
    value = logits[torch.arange(8), y]
    (slope,) = torch.autograd.grad(value.sum(), point, create_graph=True)
    draws = [plain(x + 0.01 * v)[torch.arange(8), y] - value for v in noise]
    h = 2 / 0.01**2 * torch.stack(draws).mean(0)
    size = 0.5 * slope.flatten(1).square().sum(1).mean()
    expected = 1e-3 * (h.mean() + size + 1e-3 * h.square().mean())
    expected = F.cross_entropy(logits, y) + expected
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for name, value in statistics(plain).items():
        torch.testing.assert_close(statistics(net)[name], value, rtol=1e-12, atol=1e-12)
    assert int(net[1].num_batches_tracked) == 4


def test_shared_statistics_are_constants_of_the_clean_pass():
    """The oracle: the same network with its statistics written in as constants, in evaluation mode."""
    x, y = image_batch()
    net = normed()
    frozen = copy.deepcopy(net).eval()
    first = net[0](x).detach()
    frozen[1].running_mean.copy_(first.mean((0, 2, 3)))
    frozen[1].running_var.copy_(first.var((0, 2, 3), correction=0))
    hidden = frozen[:5](x).detach()
    frozen[5].running_mean.copy_(hidden.mean(0))
    frozen[5].running_var.copy_(hidden.var(0, correction=0))
    for estimator in ("taylor-cv", "antithetic", "hutchinson", "exact"):
        options = {"estimator": estimator, "sigma": 0.1, "num_samples": 2}
        found, expected = (
            ga.ScoreMatching(generator=torch.Generator().manual_seed(3), **options)
            for _ in range(2)
        )
        found(net, x, y)
        expected(frozen, x, y)
        for name, value in expected.terms.items():
            torch.testing.assert_close(found.terms[name], value, rtol=1e-9, atol=1e-9)


def test_shared_statistics_are_differentiated_in_the_parameters():
    x, y = image_batch()
    net = normed()
    names = [name for name, _ in net.named_parameters()]

    def value(*parameters):
        table = dict(zip(names, parameters, strict=True))
        fresh = normed()
        generator = torch.Generator().manual_seed(3)
        regularizer = ga.ScoreMatching(sigma=0.1, generator=generator)
        holder = Functional(fresh, table)
        return regularizer(holder, x[:4], y[:4])

    assert torch.autograd.gradcheck(value, tuple(net.parameters()), atol=1e-6)


class Functional(nn.Module):
    """A module evaluated at given parameters, for finite differences in them."""

    def __init__(self, inner, table):
        super().__init__()
        self.inner = inner
        self.table = table

    def forward(self, x):
        return torch.func.functional_call(self.inner, self.table, (x,))


def test_the_loss_itself_is_plain_training():
    """With weight 0 every gradient is that of the cross-entropy, through the batch statistics."""
    x, y = image_batch()
    net, plain = normed(), normed()
    ga.RegularizedLoss(net, ga.ScoreMatching(weight=0.0))(x, y).backward()
    F.cross_entropy(plain(x), y).backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_frozen_statistics_are_the_running_ones():
    x, y = image_batch()
    net = normed()
    net(x)
    evaluated = copy.deepcopy(net).eval()
    found = ga.GradientNorm(bn="frozen")(net, x, y)
    torch.testing.assert_close(found, ga.GradientNorm()(evaluated, x, y), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="needs running statistics"):
        ga.GradientNorm(bn="frozen")(normed(track_running_stats=False), x, y)
    assert ga.GradientNorm()(normed(track_running_stats=False), x, y).isfinite()


def test_modes_and_layers_are_restored_after_an_error():
    class Failing(nn.Module):
        def forward(self, x):
            raise ArithmeticError("as planned")

    x, y = image_batch()
    for bn in ("shared", "frozen", "batch"):
        net = normed()
        net.append(Failing())
        with pytest.raises(ArithmeticError, match="as planned"):
            ga.RegularizedLoss(net, ga.ScoreMatching(bn=bn))(x, y)
        assert all(layer.training for layer in net.modules())
        assert all("forward" not in vars(layer) for layer in active_norms(net))


def test_dropout_draws_one_mask_for_clean_and_noisy_passes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    x, y = torch.randn(4, 5, dtype=F64), torch.tensor([0, 1, 2, 0])
    regularizer = ga.ScoreMatching(num_samples=3, sigma=0.1)
    regularizer(net, x, y)
    # for one mask the network is linear, so its trace is 0; another mask would give about 100
    assert abs(regularizer.terms["stability"]) < 1e-20
    torch.manual_seed(1)
    net(x)
    following = torch.rand(1)
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(0)
    ga.ScoreMatching(num_samples=3, generator=generator)(net, x, y)
    assert torch.equal(torch.rand(1), following)  # the noisy passes leave the stream alone


@pytest.mark.parametrize("make", [ga.ScoreMatching, ga.AntiScoreMatching])
def test_logits_with_other_dropout_masks_are_refused(make, batch):
    x, y = batch
    net = nn.Sequential(nn.Linear(5, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    point = x.clone().requires_grad_()
    logits = net(point)
    for estimator in ("taylor", "taylor-cv"):
        with pytest.raises(ValueError, match="other dropout masks"):
            make(estimator=estimator)(net, point, y, logits=logits)
    # these make all their passes themselves, with one mask: for it the network is linear
    for estimator in ("antithetic", "hutchinson"):
        regularizer = make(estimator=estimator, sigma=0.1)
        regularizer(net, point, y, logits=logits)
        assert abs(regularizer.terms["trace"]) < 1e-10
    assert ga.GradientNorm()(net, point, y, logits=logits).isfinite()


@pytest.mark.parametrize("estimator", ["taylor", "taylor-cv", "exact"])
def test_validation_without_gradients_gives_the_same_loss(estimator, batch):
    x, y = batch
    net = make_net()

    def loss():
        generator = torch.Generator().manual_seed(5)
        score = ga.ScoreMatching(estimator=estimator, generator=generator)
        return ga.RegularizedLoss(net, score, ga.GradientNorm(of="logsumexp"))(x, y)

    with torch.no_grad():
        found = loss()
    assert not found.requires_grad
    torch.testing.assert_close(found, loss().detach(), rtol=1e-12, atol=1e-12)


def test_two_regularizers_of_a_kind_keep_their_terms(net, batch):
    x, y = batch
    loss_fn = ga.RegularizedLoss(net, ga.GradientNorm(), ga.GradientNorm(of="loss"))
    loss_fn(x, y)
    for label, of in (("GradientNorm", "logit"), ("GradientNorm2", "loss")):
        size = 0.5 * ga.input_gradient(net, x, y, of).square().sum(1).mean()
        torch.testing.assert_close(loss_fn.terms[f"{label}.gradient"], size)


def test_no_graph_is_left_over_many_steps():
    net = make_net()
    x, y = torch.randn(4, 5, dtype=F64), torch.tensor([0, 2, 1, 2])
    loss_fn = ga.RegularizedLoss(net, ga.ScoreMatching(), ga.AntiScoreMatching())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    counts = []
    for step in range(100):
        optimizer.zero_grad(set_to_none=True)
        loss_fn(x, y).backward()
        optimizer.step()
        if step in (10, 99):
            counts.append(tensors())
    assert counts[1] <= counts[0]


def test_input_keeps_its_gradient_and_flags(net, batch):
    x, y = batch
    ga.RegularizedLoss(net, ga.ScoreMatching())(x, y).backward()
    assert not x.requires_grad
    assert x.grad is None


def test_autocast_changes_the_cross_entropy_only():
    net = make_net().float()
    x, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 2])

    def term():
        return ga.ScoreMatching(sigma=0.1, generator=torch.Generator().manual_seed(0))

    plain = term()
    ga.RegularizedLoss(net, plain)(x, y)
    mixed = term()
    with torch.autocast("cpu", torch.bfloat16):
        ga.RegularizedLoss(net, mixed)(x, y)
        single = term()
        single(net, x, y)
    for name, value in plain.terms.items():
        assert torch.equal(mixed.terms[name], value)
        assert torch.equal(single.terms[name], value)


def test_one_sample_has_no_batch_statistics():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3))
    before = copy.deepcopy(net.state_dict())
    x, y = torch.randn(1, 5), torch.tensor([0])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(x)
    net.load_state_dict(before)
    with pytest.raises(ValueError, match="more than one value a channel"):
        ga.RegularizedLoss(net, ga.ScoreMatching())(x, y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    images = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    assert ga.RegularizedLoss(images, ga.ScoreMatching())(torch.rand(1, 1, 2, 2), y).isfinite()


def test_running_statistics_move_once_under_autocast():
    x, y = image_batch()
    net = normed().float()
    with torch.autocast("cpu", torch.bfloat16):
        ga.RegularizedLoss(net, ga.ScoreMatching())(x.float(), y)
    assert int(net[1].num_batches_tracked) == 1


def test_half_precision_models_are_refused():
    net = make_net().bfloat16()
    x, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 2])
    with pytest.raises(ValueError, match="rounding noise"):
        ga.ScoreMatching()(net, x.bfloat16(), y)
    assert ga.ScoreMatching(allow_low_precision=True)(net, x.bfloat16(), y).ndim == 0


def test_compiled_models_have_a_clear_error():
    net = make_net().float()
    x, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 2])
    compiled = torch.compile(net, backend="aot_eager")
    for regularizer in (
        ga.ScoreMatching(),
        ga.GradientNorm(),
        ga.ScoreMatching(0.1, 0, objective="ssm"),
    ):
        with pytest.raises(RuntimeError, match="does not support double backward"):
            regularizer(compiled, x, y)
    found = ga.AntiScoreMatching(estimator="antithetic")(compiled, x, y)
    found.backward()
    assert net[0].weight.grad.isfinite().all()


def test_relu_networks_are_warned_of_once():
    class Rectified(nn.Sequential):
        pass

    net = Rectified(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x, y = torch.randn(4, 5), torch.tensor([0, 2, 1, 2])
    with pytest.warns(UserWarning, match="zero almost everywhere"):
        ga.ScoreMatching()(net, x, y)
    ga.ScoreMatching()(net, x, y)  # warnings are errors here


def test_nonfinite_values_are_returned_and_counted(net, batch):
    x, y = batch
    x = x.clone()
    x[1, 0] = math.inf
    regularizer = ga.ScoreMatching()
    assert not regularizer(net, x, y).isfinite()
    assert regularizer.terms["nonfinite"] == 1


def test_other_objectives_and_targets(net, batch):
    x, y = batch
    for objective in ("ssm", "ssm-vr", "fd-ssm", "dsm", "ksm"):

        def make(objective=objective):
            generator = torch.Generator().manual_seed(4)
            return ga.ScoreMatching(0.5, 0, objective=objective, generator=generator, sigma=0.1)

        found = make()(net, x, y)
        expected = ga.score_matching_loss(
            ga.class_logit(net, y),
            x,
            objective,
            sigma=0.1,
            generator=torch.Generator().manual_seed(4),
        )
        torch.testing.assert_close(found, 0.5 * expected.mean(), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="pass stability=0"):
        ga.ScoreMatching(objective="dsm")
    scalar = nn.Linear(5, 1).double()
    energy = ga.ScoreMatching(of=lambda out: out.squeeze(1).square())
    assert energy(scalar, x).isfinite()


def test_curvature_weighs_the_squared_diagonal(net, batch):
    x, y = batch
    diagonal = exact_hessians(lambda p: net(p)[:, 2], x[1:2]).diagonal(dim1=1, dim2=2)
    low, high = (
        ga.ScoreMatching(1.0, 0, objective="ksm", curvature=c)(net, x[1:2], y[1:2])
        for c in (0.5, 3.5)
    )
    torch.testing.assert_close(high - low, 3 * diagonal.square().sum(), rtol=1e-10, atol=1e-12)


def test_variance_reduction_of_the_denoising_objective(net, batch):
    x, y = batch
    sigma = 0.2
    z = directions(x, 1, "gaussian", torch.Generator().manual_seed(3))[0]

    def slope(points):
        point = points.clone().requires_grad_()
        return torch.autograd.grad(net(point)[torch.arange(4), y].sum(), point)[0]

    noisy = slope(x + sigma * z)
    expected = 0.5 * noisy.square().sum(1) + ((noisy - slope(x)) * z).sum(1) / sigma
    regularizer = ga.ScoreMatching(
        2.0,
        0,
        objective="dsm",
        sigma=sigma,
        variance_reduction=True,
        generator=torch.Generator().manual_seed(3),
    )
    found = regularizer(net, x, y)
    constant = 5 / (2 * sigma**2)
    torch.testing.assert_close(found, 2 * (expected.mean() + constant), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ga.ScoreMatching(0, 0, objective="ksm", curvature=math.nan),
            "curvature must be finite",
        ),
        (lambda: ga.ScoreMatching(variance_reduction=True), "variance_reduction is for"),
        (lambda: ga.ScoreMatching(math.nan), "weight must be finite"),
        (lambda: ga.ScoreMatching(sigma=0), "sigma must be"),
        (lambda: ga.ScoreMatching(num_samples=0), "num_samples must be"),
        (lambda: ga.ScoreMatching(stability=math.inf), "stability must be finite"),
        (lambda: ga.ScoreMatching(estimator="foo"), "estimator must be one of"),
        (lambda: ga.ScoreMatching(objective="foo"), "objective must be one of"),
        (lambda: ga.ScoreMatching(of="foo"), "of must be callable or one of"),
        (lambda: ga.ScoreMatching(bn="foo"), "bn must be one of"),
        (lambda: ga.ScoreMatching(distribution="foo"), "distribution must be one of"),
        (lambda: ga.AntiScoreMatching(threshold=math.inf), "threshold must be finite"),
        (lambda: ga.GradientNorm(p=3), "p must be 1 or 2"),
        (lambda: ga.ScoreMatching.preset("foo"), "preset must be"),
        (
            lambda: ga.RegularizedLoss(
                nn.Identity(), ga.ScoreMatching(), ga.GradientNorm(bn="batch")
            ),
            "disagree about bn: batch, shared",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "y is needed"),
        (torch.zeros(4), "integer class indices"),
        (torch.zeros(3, dtype=torch.long), r"shape \(4,\), got \(3,\)"),
        (torch.tensor([0, 1, 2, 3]), r"in 0..2, got 0..3"),
        (torch.tensor([0, 1, -1, 2]), r"in 0..2, got -1..2"),
    ],
)
def test_bad_labels(y, message, net, batch):
    with pytest.raises(ValueError, match=message):
        ga.GradientNorm()(net, batch[0], y)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("of", ["label", "loss"])
def test_labels_of_any_integer_type(dtype, of, net, batch):
    x, y = batch
    found = ga.GradientNorm(of=of)(net, x, y.to(dtype))
    assert torch.equal(found, ga.GradientNorm(of=of)(net, x, y))


def test_bad_outputs_and_inputs(net, batch):
    x, y = batch
    with pytest.raises(ValueError, match=r"must return \(B, C\) logits, got \(4,\)"):
        ga.GradientNorm()(lambda x: x.sum(1), x, y)
    with pytest.raises(ValueError, match=r"`of` must return \(4,\)"):
        ga.GradientNorm(of=lambda out: out)(net, x, y)
    with pytest.raises(TypeError, match="convert to float"):
        ga.GradientNorm()(net, torch.zeros(4, 5, dtype=torch.uint8), y)


def test_presets_are_the_published_numbers():
    paper, code = ga.ScoreMatching.preset("paper"), ga.ScoreMatching.preset("code", num_samples=4)
    assert (paper.weight, paper.stability, paper.estimator, paper.bn) == (
        1e-3,
        1e-3,
        "taylor",
        "batch",
    )
    assert (code.weight, code.stability, code.sigma, code.num_samples) == (1e-5, 1e-3, 0.01, 4)
    anti = ga.AntiScoreMatching.preset("paper")
    assert (anti.weight, anti.threshold, anti.sigma) == (1e-4, 1000, 0.001)
    assert ga.AntiScoreMatching.preset("code").threshold == 1e4
    assert [ga.GradientNorm.preset(n).weight for n in ("paper", "code")] == [1e-3, 1e-5]


def test_stability_term_hides_a_gradient_penalty_in_the_plain_estimator_only():
    """E h² = (tr H)² + 4‖∇f‖²/σ² + ...: the regression of E h² on ‖∇f‖² has the slope 4/σ²."""
    sigma, slopes = 0.01, {}
    x = torch.randn(1, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    many = x.expand(20_000, 5)
    y = torch.zeros(20_000, dtype=torch.long)
    for estimator in ("taylor", "taylor-cv"):
        squares, norms = [], []
        for extra in (0.0, 1.0, 2.0, 3.0):  # a linear term changes ∇f and leaves H alone

            def model(x, extra=extra):
                return (torch.sin(x).sum(1) + extra * x.sum(1))[:, None]

            regularizer = ga.ScoreMatching(
                1.0,
                1.0,
                estimator,
                sigma,
                distribution="gaussian",
                generator=torch.Generator().manual_seed(1),
            )
            regularizer(model, many, y)
            squares.append(float(regularizer.terms["stability"]))
            norms.append(2 * float(regularizer.terms["gradient"]))
        a, b = torch.tensor(norms), torch.tensor(squares)
        slopes[estimator] = float(
            ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
        )
    assert slopes["taylor"] == pytest.approx(4 / sigma**2, rel=0.05)
    assert abs(slopes["taylor-cv"]) < 1e-4 * slopes["taylor"]


def test_generators_are_saved_copied_and_pickled(net, batch):
    x, y = batch
    regularizer = ga.ScoreMatching(generator=torch.Generator().manual_seed(9))
    regularizer(net, x, y)
    saved = copy.deepcopy(regularizer.state_dict())
    copies = [copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))]
    expected = regularizer(net, x, y)
    regularizer.load_state_dict(saved)
    copies.append(regularizer)
    buffer = io.BytesIO()
    torch.save(ga.RegularizedLoss(net, copies[0]).state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    for other in copies:
        assert torch.equal(other(net, x, y), expected)
    plain = pickle.loads(pickle.dumps(ga.ScoreMatching()))
    assert plain.generator is None


@pytest.mark.parametrize("estimator", ["forward-over-reverse", "forward-forward"])
def test_transforms_refuse_batch_statistics_that_move(estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Softplus(5), nn.Linear(6, 3))
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(RuntimeError, match="use bn='shared' or bn='frozen'"):
        ga.ScoreMatching(estimator=estimator, bn="batch")(model, x, y)
    for bn in ("shared", "frozen"):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        found, wanted = (
            ga.ScoreMatching(estimator=each, bn=bn, generator=g)(model, x, y)
            for each, g in zip((estimator, "hutchinson"), generators, strict=True)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    model.eval()
    assert ga.ScoreMatching(estimator=estimator, bn="batch")(model, x, y).isfinite()


class Quadratic(nn.Module):
    """Logits -(x - mu_i)' P (x - mu_i) / 2: the classifier of Gaussians with one covariance."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.eye(2, dtype=F64))
        self.means = nn.Parameter(torch.zeros(3, 2, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        gap = (x.unsqueeze(1) - self.means) @ self.factor
        return -0.5 * gap.square().sum(2)


def test_score_matching_recovers_the_covariance_of_a_mixture():
    source = torch.Generator().manual_seed(0)
    y = torch.arange(3000) % 3
    centres = torch.tensor([[0.0, 0.0], [2.0, 1.0], [-1.0, 2.0]], dtype=F64)
    root = torch.tensor([[0.8, 0.0], [0.5, 0.6]], dtype=F64)
    x = centres[y] + torch.randn(3000, 2, generator=source, dtype=F64) @ root.T
    model = Quadratic()
    regularizer = ga.ScoreMatching(1.0, 0.0, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        regularizer(model, x, y).backward()
        optimizer.step()
    # the minimiser is the inverse of the covariance within classes; 3,000 draws leave 3 % of it open
    within = x - torch.stack([x[y == k].mean(0) for k in range(3)])[y]
    covariance = torch.linalg.inv((model.factor @ model.factor.T).detach())
    torch.testing.assert_close(covariance, within.T @ within / 3000, rtol=0.05, atol=0.01)
    torch.testing.assert_close(covariance, root @ root.T, rtol=0.08, atol=0.03)
    torch.testing.assert_close(model.means.detach(), centres, rtol=0, atol=0.1)
