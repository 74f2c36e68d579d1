"""Games with known solutions: linear ones, matrix games, Dirac-GAN, covariance learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lookahead_minmax.games.base import SmoothGame
from lookahead_minmax.spectral import bilinear_jacobian


def _matrix(name: str, value: Tensor) -> Tensor:
    if value.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(value.shape)}")
    return value


class Linear(SmoothGame):
    """The game with field v(z) = J z + c; every game looks like this near its solution.

    Args:
        matrix: J, (n, n), regular.
        offset: c, (n,).
        players: coordinates of each player, adding up to n.

    Raises:
        ValueError: shapes do not fit.
    """

    def __init__(self, matrix: Tensor, offset: Tensor, players: Sequence[int]) -> None:
        if matrix.shape != (len(offset), len(offset)) or sum(players) != len(offset):
            raise ValueError(
                f"matrix {tuple(matrix.shape)}, offset {tuple(offset.shape)} and players "
                f"{tuple(players)} do not fit"
            )
        self.matrix, self.offset, self.players = matrix, offset, tuple(players)

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return J z + c, (starts, n)."""
        return z @ self.matrix.T + self.offset

    def jacobian(self) -> Tensor:
        """Return J."""
        return self.matrix

    def solution(self) -> Tensor:
        """Return -J^-1 c."""
        result: Tensor = torch.linalg.solve(self.matrix, -self.offset)
        return result


class Bilinear(Linear):
    """f(x, y) = x'Ay + a'x + b'y; x minimises, y maximises.

    Args:
        matrix: A, (d, d), regular.
        a: (d,), zeros by default.
        b: (d,), zeros by default.

    Raises:
        ValueError: A is no square matrix or the vectors have other lengths.

    Example:
        >>> game = Bilinear(torch.eye(2), b=torch.tensor([1.0, 2.0]))
        >>> game.solution()
        tensor([-1., -2.,  0.,  0.])
    """

    def __init__(self, matrix: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> None:
        size = _matrix("matrix", matrix).shape[0]
        a = matrix.new_zeros(size) if a is None else a
        b = matrix.new_zeros(size) if b is None else b
        super().__init__(bilinear_jacobian(matrix), torch.cat([a, -b]), (size, matrix.shape[1]))

    def solution(self) -> Tensor:
        """Return (x*, y*) with A'x* = -b and A y* = -a."""
        return super().solution() + 0.0  # no negative zeros


class Quadratic(Linear):
    """f(x, y) = x'Px/2 + x'By - y'Qy/2; x minimises, y maximises, the solution is 0.

    Args:
        p: P, (m, m), symmetric.
        b: B, (m, n).
        q: Q, (n, n), symmetric.

    Raises:
        ValueError: shapes do not fit.
    """

    def __init__(self, p: Tensor, b: Tensor, q: Tensor) -> None:
        m, n = _matrix("b", b).shape
        if p.shape != (m, m) or q.shape != (n, n):
            raise ValueError(
                f"p must be ({m}, {m}) and q ({n}, {n}), got {tuple(p.shape)} and {tuple(q.shape)}"
            )
        matrix = torch.cat([torch.cat([p, b], 1), torch.cat([-b.T, q], 1)])
        super().__init__(matrix, matrix.new_zeros(m + n), (m, n))


class Polymatrix(Linear):
    """n players, every pair of whom plays a zero-sum bilinear game, with a small curvature for each.

    Args:
        sizes: coordinates of each player.
        curvature: of every player's own loss, at least 0.
        seed: of the random pairwise matrices, float64.
    """

    def __init__(self, sizes: Sequence[int], curvature: float = 0.1, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        total = sum(sizes)
        random = torch.randn(total, total, dtype=torch.float64, generator=generator)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes)))
        random[owner[:, None] == owner[None]] = 0.0
        matrix = random - random.T + curvature * torch.eye(total, dtype=torch.float64)
        super().__init__(matrix, matrix.new_zeros(total), sizes)


class StochasticBilinear(Linear):
    """The paper's finite sum: component i is x_i y_i + a_i'x + b_i'y, a minibatch sums B of them.

    Only one coordinate of a component's coupling is not zero, so a minibatch costs O(B d).

    Args:
        n: number of components, also the dimension of x and of y.
        seed: of a_i, b_i ~ N(0, I / n), float64.
    """

    def __init__(self, n: int = 100, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        generator = torch.Generator().manual_seed(seed)
        scale = n**-0.5
        self.a = torch.randn(n, n, dtype=torch.float64, generator=generator) * scale
        self.b = torch.randn(n, n, dtype=torch.float64, generator=generator) * scale
        eye = torch.eye(n, dtype=torch.float64)
        super().__init__(bilinear_jacobian(eye), torch.cat([self.a.sum(0), -self.b.sum(0)]), (n, n))

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the full field, or that of the components `batch`, (starts, B)."""
        if batch is None:
            return super().field(z)
        n = self.players[0]
        x, y = z[:, :n], z[:, n:]
        v_x, v_y = self.a[batch].sum(1), -self.b[batch].sum(1)
        v_x = v_x.scatter_add(1, batch, y.gather(1, batch))
        v_y = v_y.scatter_add(1, batch, -x.gather(1, batch))
        return torch.cat([v_x, v_y], 1)


class MatrixGame(SmoothGame):
    """A zero-sum game in mixed strategies, f = softmax(u)'A softmax(v); rows minimise.

    Args:
        payoffs: A, (m, n), what the row player pays.
        parametrisation: "softmax" plays in logits; "simplex" in the probabilities themselves, without
            a projection.

    Raises:
        ValueError: A is no matrix, or the parametrisation is unknown.
    """

    def __init__(
        self, payoffs: Tensor, parametrisation: Literal["softmax", "simplex"] = "softmax"
    ) -> None:
        if parametrisation not in ("softmax", "simplex"):
            raise ValueError(
                f"parametrisation must be 'softmax' or 'simplex', got {parametrisation!r}"
            )
        self.payoffs, self.parametrisation = _matrix("payoffs", payoffs), parametrisation
        self.players = (payoffs.shape[0], payoffs.shape[1])

    def strategies(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return both players' probabilities, (starts, m) and (starts, n)."""
        u, v = torch.split(z, list(self.players), dim=-1)
        if self.parametrisation == "simplex":
            return u, v
        return u.softmax(-1), v.softmax(-1)

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the gradients of f and of -f in the players' own coordinates."""
        x, y = self.strategies(z)
        g_x, g_y = y @ self.payoffs.T, -(x @ self.payoffs)
        if self.parametrisation == "simplex":
            return torch.cat([g_x, g_y], -1)
        v_x = x * (g_x - (x * g_x).sum(-1, keepdim=True))
        v_y = y * (g_y - (y * g_y).sum(-1, keepdim=True))
        return torch.cat([v_x, v_y], -1)

    def solution(self) -> Tensor:
        """Return an equilibrium by linear programming (needs the extra [games]).

        Raises:
            ImportError: SciPy is missing.
            ValueError: with "softmax", the equilibrium gives some strategy no probability, so that its
                logit is infinite.
        """
        x, y = self._equilibrium(self.payoffs), self._equilibrium(-self.payoffs.T)
        if self.parametrisation == "simplex":
            return torch.cat([x, y])
        if min(x.min(), y.min()) < 1e-9:
            raise ValueError("the equilibrium is not mixed: its logits are infinite")
        return torch.cat([x.log() - x.log().mean(), y.log() - y.log().mean()])

    def _equilibrium(self, payoffs: Tensor) -> Tensor:
        try:
            from scipy.optimize import linprog
        except ImportError as error:
            raise ImportError(
                'the equilibrium needs SciPy: pip install "lookahead-minmax[games]"'
            ) from error
        m, n = payoffs.shape
        cost = [0.0] * m + [1.0]  # the value that the columns can force
        bounds = [(0.0, None)] * m + [(None, None)]
        above = torch.cat([payoffs.T, -payoffs.new_ones(n, 1)], 1).double().numpy()
        total = [[1.0] * m + [0.0]]
        found = linprog(cost, A_ub=above, b_ub=[0.0] * n, A_eq=total, b_eq=[1.0], bounds=bounds)
        return torch.as_tensor(found.x[:m], dtype=payoffs.dtype)

    def distance(self, z: Tensor) -> Tensor:
        """Return the duality gap max_y f(x, y) - min_x f(x, y), (starts,); 0 at every equilibrium."""
        x, y = self.strategies(z)
        return (x @ self.payoffs).amax(-1) - (y @ self.payoffs.T).amin(-1)


class DiracGAN(SmoothGame):
    """Mescheder et al. 2018: data at 0, generator at theta, discriminator D(x) = psi x.

    f(theta, psi) = -log(1 + exp(-theta psi)) - log 2; theta minimises, psi maximises. The solution is 0,
    where the field rotates without contracting.
    """

    players: tuple[int, ...] = (1, 1)

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the gradients of f and of -f, (starts, 2)."""
        theta, psi = z.unbind(-1)
        slope = torch.sigmoid(-theta * psi)
        return torch.stack([psi * slope, -theta * slope], -1)

    def solution(self) -> Tensor:
        """Return 0."""
        return torch.zeros(2, dtype=torch.float64)


class Covariance(SmoothGame):
    """Daskalakis et al. 2018: learn a covariance, f(V, W) = tr(W S) - tr(W V V'); V minimises.

    Args:
        covariance: S, (d, d), symmetric positive definite.

    Raises:
        ValueError: S is not square or not symmetric.
    """

    def __init__(self, covariance: Tensor) -> None:
        size = _matrix("covariance", covariance).shape[0]
        if covariance.shape != (size, size) or not torch.allclose(covariance, covariance.T):
            raise ValueError("covariance must be a symmetric matrix")
        self.covariance = covariance
        self.players = (size * size, size * size)

    def _matrices(self, z: Tensor) -> tuple[Tensor, Tensor]:
        size = self.covariance.shape[0]
        v, w = torch.split(z, list(self.players), dim=-1)
        return v.view(-1, size, size), w.view(-1, size, size)

    def field(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the gradients of f and of -f, (starts, 2 d^2)."""
        v, w = self._matrices(z)
        g_v = -(w + w.mT) @ v
        g_w = v @ v.mT - self.covariance
        return torch.cat([g_v.flatten(-2), g_w.flatten(-2)], -1)

    def solution(self) -> Tensor:
        """Return the Cholesky factor of S and W = 0; V is unique up to a rotation."""
        factor: Tensor = torch.linalg.cholesky(self.covariance)
        return torch.cat([factor.flatten(), torch.zeros_like(factor).flatten()])

    def distance(self, z: Tensor) -> Tensor:
        """Return the Frobenius norm of VV' - S, (starts,); the rotation of V does not count."""
        v, _ = self._matrices(z)
        return F.pairwise_distance(
            (v @ v.mT).flatten(-2), self.covariance.flatten().expand(len(z), -1), eps=0.0
        )
