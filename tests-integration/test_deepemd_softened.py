"""deepemd and gradient-alignment: point clouds through a softened network, matched exactly."""

from __future__ import annotations

import deepemd
import gradient_alignment as ga
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from toys import PointAutoencoder, ellipses


def scipy_emd(x: Tensor, y: Tensor) -> float:
    """Mean distance of the points of two clouds to their partners in the best assignment."""
    cost = torch.cdist(x.double(), y.double()).detach().numpy()
    return float(cost[linear_sum_assignment(cost)].mean())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, float, float]:
    """A softened auto-encoder, and the exact EMD of held-out clouds before and after training."""
    torch.manual_seed(0)
    model, report = ga.soften(PointAutoencoder(points=32), report=True)
    assert sorted(report.modules) == ["decoder.1", "encoder.1"]
    held_out = ellipses(16, 32, torch.Generator().manual_seed(1))

    def score() -> float:
        with torch.no_grad():
            pairs = zip(model(held_out), held_out, strict=True)
            return sum(scipy_emd(made, cloud) for made, cloud in pairs) / len(held_out)

    before = score()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        cloud = ellipses(16, 32, generator)
        loss = deepemd.emd_loss(model(cloud), cloud)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, before, score()


def test_the_loss_trains_the_softened_network(trained: tuple[nn.Module, float, float]) -> None:
    _, before, after = trained
    assert after < 0.5 * before


def test_the_loss_is_the_exact_distance_of_what_the_network_wrote(
    trained: tuple[nn.Module, float, float],
) -> None:
    model, _, _ = trained
    cloud = ellipses(4, 32, torch.Generator().manual_seed(2))
    made = model(cloud)
    want = [scipy_emd(a, b) for a, b in zip(made, cloud, strict=True)]
    torch.testing.assert_close(
        deepemd.emd_loss(made, cloud, reduction="none"), torch.tensor(want), rtol=1e-5, atol=1e-6
    )


def test_through_the_matching_the_network_has_curvature_that_relu_has_not() -> None:
    """The trace of the loss's Hessian in the latent code: network and matching together.

    With the matching held, the loss of a ReLU decoder bends through the distances alone; a softened one
    adds its own curvature. Both are compared with the Hessian that autograd forms column by column.
    """
    torch.manual_seed(0)
    network = PointAutoencoder(points=16).double()
    decoder = ga.soften(network).decoder
    cloud = ellipses(3, 16, torch.Generator().manual_seed(0)).double()
    code = network.encoder(cloud).amax(1).detach()
    with torch.no_grad():
        index = deepemd.match(decoder(code).unflatten(1, (-1, 2)), cloud, method="exact").index
    partner = torch.gather(cloud, 1, index[..., None].expand(-1, -1, 2))

    def negative_loss(z: Tensor) -> Tensor:
        made = decoder(z).unflatten(1, (-1, 2))
        return -(made - partner).norm(dim=-1).mean(1)

    trace = ga.hessian_trace(negative_loss, code, method="exact")
    for i in range(3):
        hessian = torch.autograd.functional.hessian(
            lambda z, i=i: (
                -(decoder(z[None]).unflatten(1, (-1, 2))[0] - partner[i]).norm(dim=-1).mean()
            ),
            code[i],
        )
        torch.testing.assert_close(trace[i], hessian.trace(), rtol=1e-9, atol=1e-9)
    hidden = decoder[0](code)
    bend = torch.autograd.functional.hessian(lambda h: decoder[1](h).sum(), hidden[0])
    assert bend.diagonal().min() > 0  # Softplus; ReLU's second derivative is 0 wherever it exists
