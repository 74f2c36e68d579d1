from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lcnn
from lcnn import CenteredSoftplus, LCNNLoss, LipschitzBatchNorm1d


def small(channels: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 5),
        LipschitzBatchNorm1d(5, lipschitz=4.0),
        CenteredSoftplus(3.0, num_parameters=channels),
        nn.Linear(5, 5),
        LipschitzBatchNorm1d(5, lipschitz=0.5),
        CenteredSoftplus(2.0),
        nn.Linear(5, 4),
    ).double()


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 4


def test_penalty_is_the_sum_by_hand() -> None:
    got = lcnn.penalty(small(), beta=0.1, lipschitz=0.01)
    want = 0.1 * (3 + 2) + 0.01 * (math.log(4) + math.log(2))
    assert got.item() == pytest.approx(want, rel=1e-6)


def test_channel_betas_count_with_their_mean_and_fixed_ones_not_at_all() -> None:
    assert lcnn.penalty(small(5), beta=1.0, lipschitz=0.0).item() == pytest.approx(5, rel=1e-6)
    fixed = nn.Sequential(CenteredSoftplus(3.0, learnable=False))
    assert lcnn.penalty(fixed, beta=1.0).item() == 0


def test_shared_activation_counts_once() -> None:
    act = CenteredSoftplus(3.0)
    model = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    assert lcnn.penalty(model, beta=1.0).item() == pytest.approx(3, rel=1e-6)


def test_penalty_pulls_gamma_to_one_and_beta_linearly() -> None:
    model = small()
    lcnn.penalty(model, beta=0.1, lipschitz=0.01).backward()
    assert model[1].log_lipschitz.grad.item() == pytest.approx(0.01)
    assert model[4].log_lipschitz.grad.item() == pytest.approx(-0.01)
    assert model[2].log_beta.grad.item() == pytest.approx(0.1 * 3, rel=1e-6)


def test_log_bound_is_the_log_sum_by_hand() -> None:
    got = lcnn.penalty(small(), beta=0.1, form="log_bound")
    surrogate = 3 * 4 + 2 * 4 * 0.5
    assert got.item() == pytest.approx(0.1 * math.log(surrogate), rel=1e-6)
    assert lcnn.curvature_surrogate(small()).item() == pytest.approx(surrogate, rel=1e-6)
    widths = lcnn.curvature_surrogate(small(), torch.zeros(1, 3, dtype=torch.float64))
    assert widths.item() == pytest.approx(5 * surrogate, rel=1e-6)


def test_log_bound_takes_the_steeper_branch_of_a_residual_block() -> None:
    model = lcnn.models.small_resnet(4, size=8)
    block = model[4]
    with torch.no_grad():
        block.main[1].log_lipschitz.fill_(math.log(2.0))
        block.main[4].log_lipschitz.fill_(math.log(3.0))
        block.shortcut[1].log_lipschitz.fill_(math.log(7.0))
    alone = nn.Sequential(block)
    want = 5 * 2 + 5 * 7  # the inner activation after Gamma 2; the outer after max(2 * 3, 7)
    assert lcnn.curvature_surrogate(alone).item() == pytest.approx(want, rel=1e-5)


def test_hessian_form_is_differentiable_in_beta_and_gamma() -> None:
    model = small().eval()
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.running_var.fill_(1e-4)
    want = math.log1p(lcnn.hessian_bound(model).hessian.item())
    got = lcnn.penalty(model, beta=0.5, form="hessian")
    assert got.item() == pytest.approx(0.5 * want, rel=1e-6)
    got.backward()
    assert model[1].log_lipschitz.grad > 0
    assert model[2].log_beta.grad > 0
    with pytest.raises(ValueError, match=r"not bounded, because of 1 \(ReLU\)"):
        lcnn.penalty(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), form="hessian")


def test_unknown_form_and_missing_activations() -> None:
    with pytest.raises(ValueError, match="form must be"):
        lcnn.penalty(small(), form="max")
    with pytest.raises(ValueError, match="no CenteredSoftplus"):
        lcnn.penalty(nn.Linear(2, 2), form="log_bound")
    with pytest.raises(ValueError, match="no CenteredSoftplus"):
        lcnn.jvp_penalty(nn.Linear(2, 2), torch.zeros(1, 2), torch.ones(1, 2))


def test_gradient_norm_equals_a_loop_over_samples() -> None:
    model = small().eval()
    x, y = batch()
    x.requires_grad_()
    got = lcnn.gradnorm_penalty(F.cross_entropy(model(x), y, reduction="none"), x)
    total = 0.0
    for xi, yi in zip(x.detach(), y, strict=True):
        xi = xi[None].requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(xi), yi[None]), xi)[0]
        total += g.square().sum().item()
    assert got.item() == pytest.approx(total / 6, rel=1e-12)


def test_gradient_norm_does_not_depend_on_the_batch_size_and_has_the_papers_scale() -> None:
    model = small().eval()
    x, y = batch()
    values = []
    for k in (1, 3):
        xs, ys = x.repeat(k, 1).requires_grad_(), y.repeat(k)
        values.append(
            lcnn.gradnorm_penalty(F.cross_entropy(model(xs), ys, reduction="none"), xs).item()
        )
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    # the authors' expression: 1e-3 * 1e5 * ||d mean loss / dX||_F^2 / B
    xs = x.clone().requires_grad_()
    g = torch.autograd.grad(F.cross_entropy(model(xs), y), xs)[0]
    theirs = 1e-3 * 1e5 * g.square().sum().item() / 6
    assert theirs == pytest.approx(100 / 6**2 * values[0], rel=1e-12)


def test_gradient_norm_refuses_what_it_cannot_do() -> None:
    x, y = batch()
    model = small().eval()
    with pytest.raises(ValueError, match="requires_grad is False"):
        lcnn.gradnorm_penalty(F.cross_entropy(model(x), y, reduction="none"), x)
    xs = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="reduction='none'"):
        lcnn.gradnorm_penalty(F.cross_entropy(model(xs), y), xs)
    with pytest.raises(ValueError, match="does not depend on x"):
        lcnn.gradnorm_penalty(F.cross_entropy(model(x), y, reduction="none"), xs)
    with pytest.raises(ValueError, match="does not depend on x"):
        lcnn.gradnorm_penalty(torch.zeros(6), xs)
    assert lcnn.gradnorm_penalty((xs * 0).sum(1), xs).item() == 0


@pytest.mark.parametrize("squared", [True, False])
def test_cure_is_the_difference_of_two_gradients(squared: bool) -> None:
    model = small().eval()
    x, y = batch()
    got = lcnn.cure_penalty(model, x, y, h=0.7, squared=squared)

    def gradient(points: Tensor) -> Tensor:
        points = points.clone().requires_grad_()
        loss = F.cross_entropy(model(points), y, reduction="sum")
        return torch.autograd.grad(loss, points)[0]

    g = gradient(x)
    z = 0.7 * g.sign() / g.sign().norm(dim=1, keepdim=True)
    gap = (gradient(x + z) - g).square().sum(1)
    want = gap.mean() if squared else gap.sqrt().mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    got.backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_jvp_penalty_is_beta_times_layer_slopes() -> None:
    model = nn.Sequential(nn.Linear(3, 5, bias=False), CenteredSoftplus(3.0)).double()
    x, g = torch.randn(2, 4, 3, dtype=torch.float64)
    got = lcnn.jvp_penalty(model, x, g, eta=1e-3).item()
    d = g / g.norm(dim=1, keepdim=True)
    want = 3 * 1e-3 * (d @ model[0].weight.T).norm(dim=1).mean().item()
    assert got == pytest.approx(want, rel=1e-6)


def test_criterion_adds_its_parts_and_reports_them() -> None:
    model = small().eval()
    x, y = batch()
    criterion = LCNNLoss(model, beta=0.1, lipschitz=0.01, gradnorm=0.5, cure=0.2, jvp=0.3)
    total = criterion(x, y)
    xs = x.clone().requires_grad_()
    loss = F.cross_entropy(model(xs), y, reduction="none")
    g = torch.autograd.grad(loss.sum(), xs, retain_graph=True)[0]
    want = {
        "loss": loss.mean(),
        "beta": torch.tensor(0.5),
        "lipschitz": torch.tensor(0.01 * math.log(8)),
        "gradnorm": 0.5 * g.square().sum(1).mean(),
        "cure": 0.2 * lcnn.cure_penalty(model, x, y),
        "jvp": 0.3 * lcnn.jvp_penalty(model, x, g),
    }
    assert set(criterion.terms) == {*want, "total"}
    for name, value in want.items():
        assert criterion.terms[name].item() == pytest.approx(value.item(), rel=1e-6)
        assert not criterion.terms[name].requires_grad
    assert total.item() == pytest.approx(sum(v.item() for v in want.values()), rel=1e-6)
    assert not list(criterion.parameters())
    assert LCNNLoss(model).terms == {}


def test_criterion_gradient_equals_the_terms_by_hand() -> None:
    model = small().eval()
    twin = copy.deepcopy(model)
    x, y = batch()
    LCNNLoss(model, beta=0.1, lipschitz=0.01, gradnorm=0.5)(x, y).backward()
    xs = x.clone().requires_grad_()
    loss = F.cross_entropy(twin(xs), y, reduction="none")
    total = loss.mean() + lcnn.penalty(twin, beta=0.1) + 0.5 * lcnn.gradnorm_penalty(loss, xs)
    total.backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["log_bound", "hessian"])
def test_criterion_with_other_forms(form: str) -> None:
    model = small().eval()
    criterion = LCNNLoss(model, beta=0.1, form=form)
    criterion(*batch())
    want = lcnn.penalty(model, beta=0.1, form=form).item()
    assert criterion.terms["beta"].item() == pytest.approx(want, rel=1e-12)
    assert criterion.terms["lipschitz"] == 0


def test_criterion_with_another_loss() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    loss = LCNNLoss(model, lambda out, y: (out - y).square(), gradnorm=1.0)
    loss(torch.randn(5, 3), torch.randn(5)).backward()
    with pytest.raises(ValueError, match="reduction='none'"):
        LCNNLoss(model, lambda out, y: (out - y).square().mean())(torch.zeros(5, 3), torch.zeros(5))


def test_bad_criterion() -> None:
    with pytest.raises(ValueError, match="gradnorm must be a finite number of at least 0"):
        LCNNLoss(small(), gradnorm=-1.0)
    with pytest.raises(ValueError, match="loss_fn must be"):
        LCNNLoss(small(), "hinge")
    with pytest.raises(ValueError, match="empty batch"):
        LCNNLoss(small())(torch.zeros(0, 3), torch.zeros(0))
    with pytest.raises(ValueError, match="compile=True supports"):
        LCNNLoss(small(), cure=1.0, compile=True)
    with pytest.raises(IndexError):  # torch's own words about labels
        LCNNLoss(small().eval())(torch.zeros(2, 3).double(), torch.tensor([0, 9]))
    with pytest.raises(RuntimeError):
        LCNNLoss(small().eval())(torch.zeros(2, 3).double(), torch.tensor([0.0, 1.0]))


def test_nan_comes_through() -> None:
    x, y = batch()
    x[0, 0] = math.nan
    assert LCNNLoss(small().eval(), gradnorm=1.0)(x, y).isnan()


def test_compiled_model_is_refused_where_it_cannot_work() -> None:
    compiled = torch.compile(small(), backend="eager")
    for options in ({"gradnorm": 1.0}, {"cure": 1.0}, {"jvp": 1.0}):
        with pytest.raises(RuntimeError, match="does not support on a compiled"):
            LCNNLoss(compiled, **options)
    with pytest.raises(RuntimeError, match="does not support on a compiled"):
        lcnn.cure_penalty(compiled, *batch())
    LCNNLoss(compiled)


def test_autocast_is_off_for_second_derivatives_unless_asked_for() -> None:
    model = small().float().eval()
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    x, y = torch.randn(4, 3), torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        LCNNLoss(model)(x, y)
        LCNNLoss(model, gradnorm=1.0)(x, y)
        low = LCNNLoss(model, gradnorm=1.0, allow_low_precision=True)(x, y)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert low.isfinite()


def test_groups_spare_curvature_parameters_from_decay() -> None:
    model = small()
    groups = lcnn.param_groups(model, 0.1, base={"lr": 0.5})
    assert [len(g["params"]) for g in groups] == [6, 2, 2]
    assert [g["weight_decay"] for g in groups] == [0.1, 0, 0]
    assert all(g["lr"] == 0.5 for g in groups)
    everyone = {id(p) for g in groups for p in g["params"]}
    assert everyone == {id(p) for p in model.parameters()}
    torch.optim.SGD(groups)


@pytest.mark.parametrize("gradnorm", [0.0, 0.5])
def test_compiled_criterion_equals_the_eager_one(gradnorm: float) -> None:
    model = small().eval()
    twin = copy.deepcopy(model)
    x, y = batch()
    a = LCNNLoss(model, gradnorm=gradnorm)(x, y)
    b = LCNNLoss(twin, gradnorm=gradnorm, compile="aot_eager")(x, y)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    a.backward()
    b.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)


def test_compiled_criterion_trains_a_converted_convolutional_network_as_the_eager_one() -> None:
    layers: list[nn.Module] = [
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 4),
    ]
    model = lcnn.convert(nn.Sequential(*layers), torch.zeros(1, 1, 4, 4), lipschitz_init=0.5)
    model = model.double().train()
    twin = copy.deepcopy(model)
    eager = LCNNLoss(model, gradnorm=0.5)
    compiled = LCNNLoss(twin, gradnorm=0.5, compile="aot_eager")
    x, y = torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.arange(6) % 4
    for _ in range(3):
        a, b = eager(x, y), compiled(x, y)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        a.backward()
        b.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)
    for name, buffer in model.named_buffers():  # running statistics, vectors of the power iteration
        torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)
    assert twin[1].num_batches_tracked == 3


def test_compiled_parts_and_models_compiled_later_are_refused() -> None:
    x, y = batch()
    part = small()
    part[0] = torch.compile(part[0], backend="eager")
    with pytest.raises(RuntimeError, match="does not support on a compiled"):
        LCNNLoss(part, gradnorm=1.0)
    later = small()
    criterion = LCNNLoss(later, gradnorm=1.0)
    later.compile(backend="eager")
    with pytest.raises(RuntimeError, match="does not support on a compiled"):
        criterion(x, y)
