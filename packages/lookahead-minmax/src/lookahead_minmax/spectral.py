r"""Spectra of the methods near a stationary point: which step sizes, k and alpha contract, and how fast.

Near a stationary point the joint field is linear, v(z) = J z, and a round of every method is a matrix.
Lookahead maps each eigenvalue :math:`\lambda \to 1 - \alpha + \alpha \lambda^k`; if the base method
contracts, so does Lookahead around it, for every k and alpha (Section 4 of the paper). Rotation makes
the difference: gradient descent on a bilinear game has :math:`|1 + i \eta \sigma| > 1` for every step size, and
Lookahead brings it back below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["gda", "alt", "eg", "ogda", "pp"]
METHODS: tuple[Method, ...] = ("gda", "alt", "eg", "ogda", "pp")


def bilinear_jacobian(matrix: Tensor) -> Tensor:
    """Return the Jacobian [[0, A], [-A', 0]] of f(x, y) = x'Ay, x minimising and y maximising."""
    rows, columns = matrix.shape
    zeros = matrix.new_zeros
    top = torch.cat([zeros(rows, rows), matrix], 1)
    return torch.cat([top, torch.cat([-matrix.T, zeros(columns, columns)], 1)])


def operator(jacobian: Tensor, method: Method, lr: float, *, split: int | None = None) -> Tensor:
    r"""Return the matrix of one round of a method on the linear field v(z) = J z.

    Args:
        jacobian: J, (n, n), real or complex.
        method: "gda" (simultaneous descent, :math:`I - \eta J`), "alt" (alternating: the players after
            `split` step first, the ones before it see them), "eg" (extragradient,
            :math:`I - \eta J + \eta^2 J^2`), "ogda" (optimistic; the (2n, 2n) companion matrix on
            (z_t, z_{t-1})) or "pp" (proximal point, :math:`(I + \eta J)^{-1}`).
        lr: step size eta.
        split: for "alt", the number of coordinates of the player that steps last; n / 2 by default.

    Raises:
        ValueError: J is not square, the method is unknown, or `split` is not inside (0, n).

    Example:
        >>> j = bilinear_jacobian(torch.eye(1, dtype=torch.float64))
        >>> round(spectral_radius(operator(j, "gda", 0.3)), 7)
        1.0440307
    """
    if jacobian.ndim != 2 or jacobian.shape[0] != jacobian.shape[1]:
        raise ValueError(f"jacobian must be square, got shape {tuple(jacobian.shape)}")
    n = jacobian.shape[0]
    eye = torch.eye(n, dtype=jacobian.dtype, device=jacobian.device)
    if method == "gda":
        return eye - lr * jacobian
    if method == "alt":
        split = n // 2 if split is None else split
        if not 0 < split < n:
            raise ValueError(f"split must be inside (0, {n}), got {split}")
        first, last = eye - lr * jacobian, eye - lr * jacobian
        first[:split] = eye[:split]
        last[split:] = eye[split:]
        return last @ first
    if method == "eg":
        return eye - lr * jacobian + lr**2 * jacobian @ jacobian
    if method == "ogda":
        top = torch.cat([eye - 2 * lr * jacobian, lr * jacobian], 1)
        return torch.cat([top, torch.cat([eye, torch.zeros_like(eye)], 1)])
    if method == "pp":
        inverse: Tensor = torch.linalg.inv(eye + lr * jacobian)
        return inverse
    raise ValueError(f"method must be one of {METHODS}, got {method!r}")


def lookahead_operator(
    round_operator: Tensor, k: int | Sequence[int], alpha: float | Sequence[float]
) -> Tensor:
    r"""Return the matrix of one period of Lookahead, :math:`(1-\alpha) I + \alpha M^k`; nested for sequences.

    Args:
        round_operator: M, the matrix of a round, (n, n).
        k: rounds in a period; for nested levels each a multiple of the one below.
        alpha: factor of each level.

    Raises:
        ValueError: numbers of levels differ, or a level is no multiple of the one below.
    """
    periods = [k] if isinstance(k, int) else list(k)
    alphas = [alpha] * len(periods) if isinstance(alpha, (int, float)) else list(alpha)
    if len(periods) != len(alphas):
        raise ValueError(f"k has {len(periods)} levels, alpha has {len(alphas)}")
    result, below = round_operator, 1
    eye = torch.eye(result.shape[0], dtype=result.dtype, device=result.device)
    for period, factor in zip(periods, alphas, strict=True):
        if period < 1 or period % below:
            raise ValueError(f"k of a level must be a multiple of the one below, got {periods}")
        result = (1 - factor) * eye + factor * torch.linalg.matrix_power(result, period // below)
        below = period
    return result


def spectral_radius(matrix: Tensor) -> float:
    """Return the largest modulus of an eigenvalue; below 1 means that the iteration contracts."""
    return float(torch.linalg.eigvals(matrix).abs().max())


def lookahead_eigenvalue(eigenvalue: complex, k: int, alpha: float) -> complex:
    r"""Return :math:`1 - \alpha + \alpha \lambda^k`."""
    return 1 - alpha + alpha * eigenvalue**k


def _rotation(method: Method, step: float) -> list[complex]:
    """Return a round's eigenvalues on one singular value, where step = lr sigma."""
    jacobian = torch.tensor([[0.0, step], [-step, 0.0]], dtype=torch.float64)
    values = torch.linalg.eigvals(operator(jacobian, method, 1.0))
    return [complex(value) for value in values.tolist()]


@dataclass(frozen=True)
class Suggestion:
    """A period and how fast it contracts.

    Attributes:
        k: rounds between synchronisations.
        rate: worst contraction of the distance for one round, over the range of sigma; below 1 converges.
    """

    k: int
    rate: float


def suggest_k(
    lr: float,
    sigma_min: float,
    sigma_max: float,
    alpha: float = 0.5,
    method: Method = "gda",
    *,
    k_max: int = 1000,
    num_samples: int = 64,
) -> Suggestion:
    r"""Return the period with the best worst-case rate for a bilinear game.

    About half a turn of the rotation, :math:`k \approx \pi / \arctan(\eta \sigma)`.

    Args:
        lr: step size of the base method.
        sigma_min: smallest singular value of the coupling (for a network, the range of `rotation_frequency`).
        sigma_max: largest one.
        alpha: Lookahead's factor, in (0, 1].
        method: the base method.
        k_max: largest period that is tried.
        num_samples: singular values that are tried, evenly spaced in their logarithm.

    Raises:
        ValueError: not 0 < sigma_min <= sigma_max, or lr, alpha or k_max are out of range.

    Example:
        >>> suggest_k(0.3, 1.0, 1.0).k
        10
    """
    if not 0 < sigma_min <= sigma_max or not math.isfinite(sigma_max):
        raise ValueError(f"need 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}")
    if lr <= 0 or not 0 < alpha <= 1 or k_max < 1:
        raise ValueError(f"need lr > 0, alpha in (0, 1], k_max >= 1; got {lr}, {alpha}, {k_max}")
    count = 1 if sigma_min == sigma_max else num_samples
    sigmas = torch.logspace(
        math.log10(sigma_min), math.log10(sigma_max), count, dtype=torch.float64
    )
    values = [value for sigma in sigmas.tolist() for value in _rotation(method, lr * sigma)]
    eigenvalues = torch.tensor(values, dtype=torch.complex128)
    powers = torch.ones_like(eigenvalues)
    best = Suggestion(1, math.inf)
    for k in range(1, k_max + 1):
        powers = powers * eigenvalues
        worst = float((1 - alpha + alpha * powers).abs().max())
        if not math.isfinite(worst):
            break
        if (rate := worst ** (1 / k)) < best.rate:
            best = Suggestion(k, rate)
    return best


def stability_map(
    steps: Tensor, periods: Tensor, alpha: float = 0.5, method: Method = "gda"
) -> Tensor:
    """Return the contraction per round over a grid, for pictures: below 1 converges.

    Args:
        steps: values of lr sigma, (s,).
        periods: values of k, (p,).
        alpha: Lookahead's factor.
        method: the base method.

    Returns:
        Rates, (p, s), float64.
    """
    eigenvalues = torch.tensor([_rotation(method, step) for step in steps.tolist()])
    result = torch.empty(len(periods), len(steps), dtype=torch.float64)
    for row, k in enumerate(periods.tolist()):
        worst = (1 - alpha + alpha * eigenvalues.to(torch.complex128) ** k).abs().amax(1)
        result[row] = worst ** (1 / k)
    return result


def rotation_frequency(
    field: Callable[[Tensor], Tensor],
    point: Tensor,
    *,
    num_eigenvalues: int = 4,
    num_steps: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the leading eigenvalues of a field's Jacobian by Arnoldi iteration on Jacobian-vector products.

    Their imaginary parts are the frequencies of rotation; times the step size they are what `suggest_k`
    takes. No matrix is formed, so it works for networks whose weights are flattened into one vector.

    Args:
        field: the joint field v, maps (n,) to (n,); it is differentiated in forward mode.
        point: z, (n,).
        num_eigenvalues: how many to return.
        num_steps: size of the Krylov space, at most n is used.
        generator: of the random start; the default one otherwise.

    Returns:
        complex eigenvalues of largest modulus, (at most num_eigenvalues,), complex128.

    Raises:
        ValueError: `point` is not a vector.
    """
    if point.ndim != 1:
        raise ValueError(f"point must be a vector, got shape {tuple(point.shape)}")
    start = torch.randn(point.shape, dtype=point.dtype, device="cpu", generator=generator)
    basis = [start.to(point.device) / start.norm()]
    size = min(num_steps, point.numel())
    hessenberg = torch.zeros(size + 1, size, dtype=torch.float64)
    used = size
    for column in range(size):
        vector = torch.func.jvp(field, (point,), (basis[column],))[1]
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            for row, direction in enumerate(basis):
                overlap = torch.dot(direction, vector)
                hessenberg[row, column] += float(overlap)
                vector = vector - overlap * direction
        norm = float(vector.norm())
        hessenberg[column + 1, column] = norm
        if norm < 1e-10 * float(hessenberg.abs().max()):
            used = column + 1
            break
        basis.append(vector / norm)
    eigenvalues: Tensor = torch.linalg.eigvals(hessenberg[:used, :used])
    order = eigenvalues.abs().argsort(descending=True)
    return eigenvalues[order][:num_eigenvalues]
