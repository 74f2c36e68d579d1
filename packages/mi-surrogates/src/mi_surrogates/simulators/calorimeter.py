"""A sampling calorimeter in a few vectorised lines: showers, sampling, light, noise.

The longitudinal profile is that of Longo and Sestili with the fluctuations of Grindhammer and Peters
(hep-ex/0001020); a cell is an absorber followed by a scintillator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammainc
from torch import Tensor

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Material:
    """A material: radiation length in mm, critical energy in MeV, minimal dE/dx in MeV/mm, effective Z.

    Example:
        >>> round(MATERIALS["Pb"].x0, 3)
        5.612
    """

    x0: float
    critical: float
    dedx: float
    z: float


MATERIALS = {
    "Pb": Material(5.612, 7.43, 1.274, 82),
    "Fe": Material(17.57, 21.68, 1.143, 26),
    "W": Material(3.504, 7.97, 2.210, 74),
    "PbWO4": Material(8.903, 9.64, 1.020, 68),
    "LYSO": Material(11.4, 12.4, 0.96, 64),
    "polystyrene": Material(413.1, 93.11, 0.2052, 5.7),
}


@dataclass(frozen=True)
class Showers:
    """Parameters of the profile dE/dt ∝ (b t)^(α−1) e^(−b t): means, spreads and correlation."""

    log_t: Any
    sigma_t: Any
    log_alpha: Any
    sigma_alpha: Any
    rho: Any


def shower_parameters(energy: Any, critical: float, z: float, *, clamp: bool = True) -> Showers:
    """Return the parameters of Grindhammer and Peters for energies in GeV (NumPy or torch).

    Args:
        energy: in GeV.
        critical: critical energy of the mixture in MeV.
        z: its effective Z.
        clamp: keep the spreads in [0, 1], as the simulator does.

    Example:
        >>> low, high = shower_parameters(np.array([1.0, 10.0]), 7.43, 82.0).log_t
        >>> bool(low < high)
        True
    """
    log = torch.log if isinstance(energy, Tensor) else np.log
    scale = (1000.0 / critical) * energy
    ell = log(scale)
    sigma_t, sigma_alpha = 1 / (1.26 * ell - 1.4), 1 / (0.86 * ell - 0.58)
    if clamp:
        ell = ell.clip(1.5)
        sigma_t = 1 / (1.26 * ell - 1.4).clip(1.0)
        sigma_alpha = 1 / (0.86 * ell - 0.58).clip(1.0)
    rho = (0.705 - 0.023 * ell).clip(-1.0, 1.0)
    return Showers(
        log(ell - 0.858), sigma_t, log(0.21 + (0.492 + 2.38 / z) * ell), sigma_alpha, rho
    )


class SamplingCalorimeter:
    """Events (x, y): x the energy of a photon in GeV, y the energies of L scintillator layers in GeV.

    θ = (a1, s1, …, aL, sL) in mm. In cell k the shower leaves E_k; the share f = s dE/dx_s /
    (a dE/dx_a + s dE/dx_s) of it is visible, with a sampling fluctuation (σ/E)² = 0.2² (a/X0)(1 − f)/E_k
    (20 %/√E at one radiation length), Poisson statistics of the light, a spread of the gain and noise.

    Args:
        materials: names in `MATERIALS`, or instances of `Material`, absorber and scintillator in turn, 2 L of them.
        energies: range of the uniform energy in GeV.
        light: photo-electrons per MeV.
        gain: relative spread of a layer's gain.
        noise: of a layer, in MeV.
        sampling: the constant 0.2.

    Attributes:
        names: of the parameters.
        x_entropy: H(X) in nats.

    Raises:
        ValueError: unknown material, or an odd number of them.

    Example:
        >>> x, y = SamplingCalorimeter(["Pb", "PbWO4"] * 3)(np.full(6, 20.0), 100, 0)
        >>> x.shape, y.shape
        ((100, 1), (100, 3))
    """

    def __init__(
        self,
        materials: Sequence[str | Material],
        *,
        energies: tuple[float, float] = (1.0, 20.0),
        light: float = 2.0,
        gain: float = 0.005,
        noise: float = 5.0,
        sampling: float = 0.2,
    ) -> None:
        if len(materials) < 2 or len(materials) % 2:
            raise ValueError(
                f"materials must be absorber and scintillator in turn, got {len(materials)} of them"
            )
        for each in materials:
            if isinstance(each, str) and each not in MATERIALS:
                raise ValueError(f"material must be one of {', '.join(MATERIALS)}, got {each!r}")
        if not 0 < energies[0] < energies[1]:
            raise ValueError(f"energies must be a range above 0, got {energies}")
        self.materials = [MATERIALS[m] if isinstance(m, str) else m for m in materials]
        self.energies, self.light, self.gain = energies, light, gain
        self.noise, self.sampling = noise, sampling
        self.names = [f"{kind}{i + 1}" for i in range(len(materials) // 2) for kind in "as"]
        self.x_entropy = float(np.log(energies[1] - energies[0]))

    def _stack(self, theta: Floats) -> tuple[Floats, float, float, Floats, Floats]:
        """Return cell edges in X0, critical energy, Z, visible share and sampling term of the cells."""
        theta = np.asarray(theta, dtype=np.float64).reshape(-1)
        if theta.shape[0] != len(self.materials) or not (theta >= 0).all() or not theta.any():
            raise ValueError(
                f"theta must be {len(self.materials)} thicknesses in mm, at least 0, got {theta}"
            )
        x0, critical, dedx, z = (
            np.array([getattr(m, name) for m in self.materials])
            for name in ("x0", "critical", "dedx", "z")
        )
        depth = theta / x0
        share = depth / depth.sum()
        edges = np.cumsum(depth)[1::2]
        light = theta * dedx
        visible = light[1::2] / np.maximum(light[::2] + light[1::2], 1e-300)
        sampling = self.sampling**2 * depth[::2] * (1 - visible)
        return edges, 1 / float((share / critical).sum()), float(share @ z), visible, sampling

    def __call__(self, theta: Floats, n: int, seed: int) -> tuple[Floats, Floats]:
        """Simulate n events in float64 with NumPy: x (n, 1), y (n, L)."""
        rng = np.random.default_rng(seed)
        energy = rng.uniform(*self.energies, n)
        return energy[:, None], self.respond(theta, energy, rng)

    def respond(self, theta: Floats, energy: Floats, rng: np.random.Generator) -> Floats:
        """Return the layers' energies (n, L) for given true energies (n,)."""
        edges, critical, z, visible, sampling = self._stack(theta)
        n, layers = energy.shape[0], edges.shape[0]
        cells = fractions(energy, edges, critical, z, rng)[:, :layers] * energy[:, None]
        shape = cells.clip(1e-9) / np.maximum(sampling, 1e-12)
        seen = cells * visible * (rng.standard_gamma(shape) / shape)
        seen = rng.poisson(seen * (1000 * self.light)) / (1000 * self.light)
        seen *= 1 + self.gain * rng.standard_normal((n, layers))
        seen += (self.noise / 1000) * rng.standard_normal((n, layers))
        return np.asarray(seen)

    def torch_events(
        self,
        theta: Floats,
        n: int,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Simulate n events on a device with torch; the same model, other random numbers."""
        edges, critical, z, visible, sampling = self._stack(theta)
        options: Any = {"device": device, "dtype": dtype}
        low, high = self.energies
        energy = low + (high - low) * torch.rand(n, generator=generator, **options)
        p = shower_parameters(energy, critical, z)
        g1, g2 = torch.randn(2, n, generator=generator, **options)
        t_max = torch.exp(p.log_t + p.sigma_t * g1)
        second = p.rho * g1 + torch.sqrt(1 - p.rho**2) * g2
        alpha = torch.exp(p.log_alpha + p.sigma_alpha * second).clamp_min(1.05)
        b = (alpha - 1) / t_max
        walls = torch.as_tensor(np.array([0.0, *edges]), **options)
        inside = torch.special.gammainc(alpha[:, None], b[:, None] * walls)
        cells = inside.diff(dim=1) * energy[:, None]
        shape = cells.clamp_min(1e-9) / torch.as_tensor(sampling, **options).clamp_min(1e-12)
        gamma = torch._standard_gamma(shape, generator=generator) / shape
        rate = cells * torch.as_tensor(visible, **options) * gamma * (1000 * self.light)
        seen = torch.poisson(rate, generator=generator) / (1000 * self.light)
        noise = torch.randn(2, *seen.shape, generator=generator, **options)
        return energy[:, None], seen * (1 + self.gain * noise[0]) + self.noise / 1000 * noise[1]

    def judge(self, theta: Floats, n: int = 40_000, seed: int = 1_000_003) -> tuple[float, float]:
        """Return the loss and the resolution of a quadratic regression, independent of the optimiser.

        Returns:
            ⟨(x̂ − x)² / (x + 1)⟩ in GeV and the root mean square of (x̂ − x)/x, on the half of the events
            that was not fitted.
        """
        x, y = self(theta, n, seed)
        y = y / np.maximum(np.abs(y).mean(0), 1e-9)
        cross = [y[:, i] * y[:, j] for i in range(y.shape[1]) for j in range(i + 1)]
        features = np.column_stack([np.ones(n), y, *cross])
        half = n // 2
        weight = 1 / np.sqrt(x[:half, 0] + 1)
        fitted = np.linalg.lstsq(
            features[:half] * weight[:, None], x[:half, 0] * weight, rcond=None
        )[0]
        truth = x[half:, 0]
        error = features[half:] @ fitted - truth
        loss = float((error**2 / (truth + 1)).mean())
        return loss, float(np.sqrt(((error / truth) ** 2).mean()))

    def resolution(self, theta: Floats, n: int = 40_000, seed: int = 1_000_003) -> float:
        """Return the relative resolution of `judge`.

        Example:
            >>> calo = SamplingCalorimeter(["Pb", "PbWO4"] * 3)
            >>> calo.resolution(np.array([0.05, 60] * 3)) < 0.03
            True
        """
        return self.judge(theta, n, seed)[1]


def fractions(
    energy: Floats,
    edges: Floats,
    critical: float,
    z: float,
    rng: np.random.Generator,
    *,
    clamp: bool = True,
) -> Floats:
    """Return the shares (n, len(edges) + 1) of the energy up to the edges (in X0), and the leakage.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> shares = fractions(np.full(5, 10.0), np.array([5.0, 20.0]), 7.43, 82.0, rng)
        >>> bool(np.allclose(shares.sum(1), 1))
        True
    """
    p = shower_parameters(energy, critical, z, clamp=clamp)
    g1, g2 = rng.standard_normal((2, energy.shape[0]))
    t_max = np.exp(p.log_t + p.sigma_t * g1)
    second = p.rho * g1 + np.sqrt(1 - p.rho**2) * g2
    alpha = np.exp(p.log_alpha + p.sigma_alpha * second).clip(1.05)
    b = (alpha - 1) / t_max
    inside = np.empty((energy.shape[0], len(edges) + 2))
    inside[:, 0], inside[:, -1] = 0, 1
    gammainc(alpha[:, None], b[:, None] * edges, out=inside[:, 1:-1])
    return np.diff(inside, axis=1)
