"""gradient-alignment and lcnn: two packages measure the same derivatives of a low-curvature network."""

from __future__ import annotations

import gradient_alignment as ga
import lcnn
import pytest
import torch
from torch import Tensor, nn
from toys import spots


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8)
    )
    model = lcnn.convert(plain, torch.zeros(2, 1, 8, 8)).double()
    images = spots(64, torch.Generator().manual_seed(0))[0].double()
    for _ in range(5):
        model(images)  # running statistics and singular vectors
    return model.eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    images, row, _ = spots(5, torch.Generator().manual_seed(1))
    return images.double(), row


def test_gradients_of_one_package_are_the_norms_of_the_other(
    network: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    for of, fn in (("logit", "logit"), ("loss", "loss")):
        gradient = ga.input_gradient(network, x, y, of=of)
        norms = lcnn.curvature(network, x, y, fn=fn, method="exact").grad_norm
        torch.testing.assert_close(gradient.flatten(1).norm(dim=1), norms, rtol=1e-9, atol=0)


def test_traces_lie_within_what_the_hessian_norm_allows_and_equal_autograd(
    network: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    density = ga.class_logit(network, y)
    trace = ga.hessian_trace(density, x, method="exact")
    norm = lcnn.curvature(network, x, y, fn="logit", method="exact").hessian_norm
    for i in range(len(x)):
        hessian = torch.autograd.functional.hessian(
            lambda image, i=i: network(image[None])[0, y[i]], x[i]
        ).reshape(64, 64)
        torch.testing.assert_close(trace[i], hessian.trace(), rtol=1e-8, atol=1e-10)
        largest = torch.linalg.eigvalsh(hessian).abs().max()
        torch.testing.assert_close(norm[i], largest, rtol=1e-6, atol=0)
        assert trace[i].abs() <= 64 * norm[i]


def test_softening_finds_nothing_to_soften(network: nn.Module) -> None:
    _, report = ga.soften(network, report=True)
    assert report.modules == []


def test_score_matching_and_low_curvature_train_together(batch: tuple[Tensor, Tensor]) -> None:
    """One loss has the terms of both packages; its gradient is the sum of theirs."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    model = lcnn.convert(plain).double()
    x, y = batch
    regularised = ga.RegularizedLoss(model, ga.ScoreMatching(weight=1e-2, estimator="exact"))

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(parts, model.parameters(), strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])

    model.eval()  # the spectral norm moves its vectors while training
    both = gradient(regularised(x, y) + lcnn.penalty(model))
    torch.testing.assert_close(both, gradient(regularised(x, y)) + gradient(lcnn.penalty(model)))
    assert gradient(lcnn.penalty(model)).abs().sum() > 0
