"""mi-surrogates and hypermixer: a detector's design is chosen for the network that reads it."""

from __future__ import annotations

from typing import Any

import hypermixer
import mi_surrogates as mi
import numpy as np
import torch
from torch import Tensor, nn

TOKENS = 5


def simulate(theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n events of a detector with 5 sensors, whose gain is largest at theta = 1; noise of deviation 1/2.

    Every event permutes its sensors: the reading network must not rely on their order.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1))
    gain = np.exp(-((theta[0] - 1.0) ** 2))
    y = gain * x + 0.5 * rng.normal(size=(n, TOKENS))
    return x, rng.permuted(y, axis=1)


class Reader(nn.Module):
    """Reads sensors as a set: embedding, HyperMixing without positions, mean, a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 16)
        self.mix = hypermixer.HyperMixing(16, 32, num_heads=2, token_info=None)
        self.out = nn.Linear(16, 1)

    def forward(self, y: Tensor) -> Tensor:
        tokens = self.embed(y[..., None])
        return self.out((tokens + self.mix(tokens)).mean(1))


class HyperMixerReconstruction:
    """-log of the mean squared error of a HyperMixer, one for each design, on events kept aside."""

    def evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        values, errors = [], []
        for x, y in zip(batch.x.float(), batch.y.float(), strict=True):
            torch.manual_seed(batch.seed)
            model, half = Reader(), len(x) // 2
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(40):
                optimizer.zero_grad()
                (model(y[:half]) - x[:half]).square().mean().backward()
                optimizer.step()
            with torch.no_grad():
                squared = (model(y[half:]) - x[half:]).square().flatten().double()
            values.append(-squared.mean().log())
            errors.append(squared.std() / squared.mean() / len(squared) ** 0.5)
        return torch.stack(values), torch.stack(errors)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def run(seed: int = 0) -> Any:
    space = mi.DesignSpace({"position": mi.Parameter(-1.0, -1.5, 2.0)})
    return mi.optimize(
        simulate,
        space,
        HyperMixerReconstruction(),
        designs=8,
        events=200,
        iterations=6,
        seed=seed,
        progress=False,
    )


def test_the_design_moves_to_where_the_network_reads_best() -> None:
    """The error of the best linear estimate at gain g is 1 / (1 + 20 g^2): least at position 1."""
    result = run()
    found = float(result.theta[0])
    assert abs(found - 1.0) < 0.5  # started at -1, where the gain is 0.018
    gain = np.exp(-((found - 1.0) ** 2))
    assert 1 / (1 + 4 * TOKENS * gain**2) < 0.08  # 0.048 at the optimum, 0.99 at the start


def test_a_run_with_a_network_of_another_package_repeats_bit_for_bit() -> None:
    assert np.array_equal(run(seed=1).theta, run(seed=1).theta)
