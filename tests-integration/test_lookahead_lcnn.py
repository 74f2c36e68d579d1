"""lookahead-minmax and lcnn: a GAN whose discriminator has controlled slope and curvature."""

from __future__ import annotations

import lcnn
import pytest
import torch
from lookahead_minmax import LookaheadMinmax
from torch import Tensor, nn
from toys import spots

PERIOD = 5


def softplus(x: Tensor) -> Tensor:
    return nn.functional.softplus(x).mean()


def discriminator() -> nn.Module:
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1),
    )  # fmt: skip
    return lcnn.convert(plain, torch.zeros(2, 1, 8, 8))


class Game:
    """One generator and one converted discriminator on images of bright spots."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.D = discriminator()
        self.G = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8))
        )
        self.opt_d = torch.optim.Adam(lcnn.param_groups(self.D, weight_decay=0.0), lr=2e-3)
        self.opt_g = torch.optim.Adam(self.G.parameters(), lr=2e-3)
        self.lookahead = LookaheadMinmax({"D": self.opt_d, "G": self.opt_g}, k=PERIOD, alpha=0.5)
        self.generator = torch.Generator().manual_seed(1)

    def base_round(self) -> None:
        real, _, _ = spots(16, self.generator)
        fake = self.G(torch.randn(16, 8, generator=self.generator))
        self.opt_d.zero_grad()
        loss = softplus(-self.D(real)) + softplus(self.D(fake.detach()))
        (loss + lcnn.penalty(self.D, beta=1e-2, lipschitz=1e-2)).backward()
        self.opt_d.step()
        self.opt_g.zero_grad()
        softplus(-self.D(fake)).backward()
        self.opt_g.step()

    def weights(self) -> dict[str, Tensor]:
        both = {"D": self.D, "G": self.G}
        return {
            f"{player}.{name}": p.detach().clone()
            for player, net in both.items()
            for name, p in net.named_parameters()
        }


def test_slopes_and_curvatures_step_back_with_the_weights() -> None:
    """After a period every parameter, log_beta and log_lipschitz among them, is half way back."""
    game = Game()
    start = game.weights()
    for _ in range(PERIOD - 1):
        game.base_round()
        game.lookahead.step()
    game.base_round()
    fast = game.weights()
    game.lookahead.step()
    assert {"D.1.log_lipschitz", "D.2.log_beta"} <= set(start)
    for name, value in game.weights().items():
        assert not torch.equal(fast[name], start[name]), name
        want = start[name].double() + 0.5 * (fast[name].double() - start[name].double())
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-8)


def test_convolutions_keep_slope_one_while_the_players_step_back() -> None:
    """The singular vectors are buffers and stay with the fast weights; a few steps later they fit again."""
    game = Game()
    for _ in range(6 * PERIOD + 3):
        game.base_round()
        game.lookahead.step()
    for index, size, stride in ((0, 8, 1), (3, 8, 2)):
        weight = game.D[index].weight.detach()
        norm = lcnn.conv_operator_norm(
            weight, (size, size), stride=stride, padding=1, method="exact"
        )
        assert norm.item() == pytest.approx(1.0, abs=0.05)
    assert all(value.isfinite().all() for value in game.weights().values())


def test_slow_weights_evaluate_a_discriminator_whose_gradients_are_bounded() -> None:
    """The logit's slope stays under the product of the layers' bounds, also at the slow weights."""
    game = Game()
    for _ in range(3 * PERIOD + 2):
        game.base_round()
        game.lookahead.step()
    images, _, _ = spots(32, torch.Generator().manual_seed(2))
    game.D.eval()
    with game.lookahead.slow_weights():
        bound = lcnn.hessian_bound(game.D)
        found = lcnn.curvature(game.D, images, fn=lambda out, y: out[:, 0], method="exact")
        assert found.grad_norm.max() <= 1.05 * bound.lipschitz
        assert found.hessian_norm.max() <= 1.1 * bound.hessian
        assert found.hessian_norm.max() > 0
