r"""Spectra of the methods near a stationary point: which step sizes, k and alpha contract, and how fast.

Near a stationary point the joint field is linear, v(z) = J z, and a round of every method is a matrix.
Lookahead maps each eigenvalue :math:`\lambda \to 1 - \alpha + \alpha \lambda^k`; if the base method
contracts, so does Lookahead around it, for every k and alpha (Section 4 of the paper). Rotation makes
the difference: gradient descent on a bilinear game has :math:`|1 + i \eta \sigma| > 1` for every step size, and
Lookahead brings it back below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lookahead_minmax.core.players import Players, normalize_players

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
    round_operator: Tensor,
    k: int | Sequence[int],
    alpha: float | Sequence[float],
    *,
    kept: int = 0,
) -> Tensor:
    r"""Return the matrix of one period of Lookahead, :math:`(1-\alpha) I + \alpha M^k`; nested for sequences.

    Lookahead steps the weights back and leaves the optimizers' state (`state="keep"`). Where a round's
    matrix also acts on state, as that of "ogda" on the previous point, these coordinates are `kept`.

    Args:
        round_operator: M, the matrix of a round, (n, n).
        k: rounds in a period; for nested levels each a multiple of the one below.
        alpha: factor of each level.
        kept: how many of the last coordinates are state that is not stepped back: n for the (2n, 2n)
            matrix of "ogda", 0 for the other methods.

    Raises:
        ValueError: numbers of levels differ, a level is no multiple of the one below, or `kept` is not
            in [0, n).
    """
    periods = [k] if isinstance(k, int) else list(k)
    alphas = [alpha] * len(periods) if isinstance(alpha, (int, float)) else list(alpha)
    if len(periods) != len(alphas):
        raise ValueError(f"k has {len(periods)} levels, alpha has {len(alphas)}")
    if not 0 <= kept < len(round_operator):
        raise ValueError(f"kept must be in [0, {len(round_operator)}), got {kept}")
    result, below = round_operator, 1
    for period, factor in zip(periods, alphas, strict=True):
        if period < 1 or period % below:
            raise ValueError(f"k of a level must be a multiple of the one below, got {periods}")
        power = torch.linalg.matrix_power(result, period // below)
        result, below = _step_back(power, factor, kept), period
    return result


def _step_back(power: Tensor, alpha: float, kept: int) -> Tensor:
    """Return (1 - alpha) I + alpha M^k for matrices M^k (..., n, n), with the rows of state as in M^k."""
    eye = torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)
    result = (1 - alpha) * eye + alpha * power
    if kept:
        result[..., -kept:, :] = power[..., -kept:, :]
    return result


def spectral_radius(matrix: Tensor) -> float:
    """Return the largest modulus of an eigenvalue; below 1 means that the iteration contracts."""
    return float(torch.linalg.eigvals(matrix).abs().max())


def lookahead_eigenvalue(eigenvalue: complex, k: int, alpha: float) -> complex:
    r"""Return :math:`1 - \alpha + \alpha \lambda^k`."""
    return 1 - alpha + alpha * eigenvalue**k


def _rotations(method: Method, steps: Tensor) -> tuple[Tensor, int]:
    """Return a round's matrix for every step = lr sigma, and how many of its coordinates are state."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    matrices = [operator(step * turn, method, 1.0) for step in steps.tolist()]
    return torch.stack(matrices), 2 if method == "ogda" else 0


def _radii(power: Tensor, alpha: float, kept: int) -> Tensor:
    """Return the spectral radius of a period for every M^k (s, n, n); inf where M^k overflowed."""
    overflow = ~power.isfinite().all(-1).all(-1)
    period = _step_back(power.masked_fill(overflow[:, None, None], 0.0), alpha, kept)
    radii: Tensor = torch.linalg.eigvals(period).abs().amax(-1)
    return radii.masked_fill(overflow, math.inf)


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
    matrices, kept = _rotations(method, lr * sigmas)
    powers = torch.eye(matrices.shape[-1], dtype=torch.float64)
    best = Suggestion(1, math.inf)
    for k in range(1, k_max + 1):
        powers = powers @ matrices
        worst = float(_radii(powers, alpha, kept).max())
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
    matrices, kept = _rotations(method, steps)
    result = torch.empty(len(periods), len(steps), dtype=torch.float64)
    for row, k in enumerate(periods.tolist()):
        worst = _radii(torch.linalg.matrix_power(matrices, k), alpha, kept)
        result[row] = worst ** (1 / k)
    return result


Losses = Sequence[Tensor] | Mapping[str, Tensor]


def rotation_frequency(
    field: Callable[[Tensor], Tensor] | Callable[[], Losses],
    point: Tensor | Players,
    *,
    num_eigenvalues: int = 4,
    num_steps: int = 32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the leading eigenvalues of a field's Jacobian by Arnoldi iteration, without forming it.

    Their imaginary parts are the frequencies of rotation; times the step size they are what `suggest_k`
    takes. For plain gradient steps: Adam's scaling of the field is not in them.

    Args:
        field: the joint field v, maps (n,) to (n,), differentiated in forward mode; or, for networks, a
            closure that returns every player's own loss, in the players' order or by name.
        point: z, (n,); or the players, as for `LookaheadMinmax`. The losses are computed once, at the
            present weights, and differentiated twice; an optimizer that maximises counts as such.
        num_eigenvalues: how many to return.
        num_steps: size of the Krylov space, at most n is used.
        generator: of the random start; the default one otherwise.

    Returns:
        complex eigenvalues of largest modulus, (at most num_eigenvalues,), complex128.

    Raises:
        ValueError: `point` is no vector, or there are not as many losses as players.
        KeyError: the losses' names are not the players'.

    Example:
        >>> x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> players = {"x": torch.optim.SGD([x], 0.1), "y": torch.optim.SGD([y], 0.1)}
        >>> values = rotation_frequency(lambda: {"x": 2 * x @ y, "y": -2 * x @ y}, players)
        >>> sorted(round(value.imag, 4) for value in values.tolist())
        [-2.0, 2.0]
    """
    like, product = _vector_product(field, point)
    start = torch.randn(like.shape, dtype=like.dtype, device="cpu", generator=generator)
    basis = [start.to(like.device) / start.norm()]
    size = min(num_steps, like.numel())
    hessenberg = torch.zeros(size + 1, size, dtype=torch.float64)
    used = size
    for column in range(size):
        vector = product(basis[column])
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            for row, direction in enumerate(basis):
                overlap = torch.dot(direction, vector)
                hessenberg[row, column] += float(overlap)
                vector = vector - overlap * direction
        norm = float(vector.norm())
        hessenberg[column + 1, column] = norm
        if norm <= 1e-10 * float(hessenberg.abs().max()):
            used = column + 1
            break
        basis.append(vector / norm)
    eigenvalues: Tensor = torch.linalg.eigvals(hessenberg[:used, :used])
    order = eigenvalues.abs().argsort(descending=True)
    return eigenvalues[order][:num_eigenvalues]


def _vector_product(
    field: Any, point: Tensor | Players
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return a vector of the game's size and the product with J, or with J', of the same eigenvalues."""
    if isinstance(point, Tensor):
        if point.ndim != 1:
            raise ValueError(f"point must be a vector, got shape {tuple(point.shape)}")
        return point, lambda vector: torch.func.jvp(field, (point,), (vector,))[1]
    players, losses = normalize_players(point), field()
    if len(losses) != len(players):
        raise ValueError(f"{len(losses)} losses for {len(players)} players {list(players)}")
    if isinstance(losses, Mapping) and set(losses) != set(players):
        raise KeyError(f"losses of {sorted(losses)}, the players are {sorted(players)}")
    weights: list[Tensor] = []
    gradients: list[Tensor] = []
    for index, (name, optimizers) in enumerate(players.items()):
        loss = losses[name] if isinstance(losses, Mapping) else losses[index]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            own = [tensor for tensor in group["params"] if tensor.requires_grad]
            sign = -1 if group.get("maximize") else 1
            weights += own
            gradients += [sign * part for part in _flat(loss, own, create_graph=True)]
    joint = torch.cat(gradients)

    def product(vector: Tensor) -> Tensor:
        if not joint.requires_grad:  # all losses are linear
            return torch.zeros_like(vector)
        return torch.cat(_flat(joint, weights, vector))

    return joint.detach(), product


def _flat(
    output: Tensor, inputs: list[Tensor], vector: Tensor | None = None, create_graph: bool = False
) -> list[Tensor]:
    """Return the flattened gradients of an output, zeros where it does not depend on an input."""
    found = torch.autograd.grad(
        output,
        inputs,
        vector,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return [gradient.flatten() for gradient in found]
