"""Local surrogates of the objective: networks, an ensemble, a quadratic, a Gaussian process.

All are `nn.Module`s with `fit(theta, value, stderr=None, weight=None)` and
`forward(theta) -> (mean, std)`; theta is (P, F), value, stderr and weight are (P,), never (P, 1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mi_surrogates.errors import missing
from mi_surrogates.information.networks import BatchedMLP


def check_points(
    theta: Tensor, value: Tensor, stderr: Tensor | None, weight: Tensor | None
) -> Tensor:
    """Check the shapes of a regression and return its weights (P,), of mean 1.

    A value of shape (P, 1) against a prediction (P,) would broadcast to P × P without an error.

    Example:
        >>> check_points(torch.zeros(3, 2), torch.zeros(3), None, None)
        tensor([1., 1., 1.])
    """
    if theta.dim() != 2 or theta.shape[0] == 0:
        raise ValueError(f"theta must be (P, F), got {tuple(theta.shape)}")
    for name, each in (("value", value), ("stderr", stderr), ("weight", weight)):
        if each is not None and each.shape != theta.shape[:1]:
            raise ValueError(f"{name} must be ({theta.shape[0]},), got {tuple(each.shape)}")
    if not bool(torch.isfinite(theta).all()) or not bool(torch.isfinite(value).all()):
        raise ValueError("theta and value must be finite")
    for name, each in (("stderr", stderr), ("weight", weight)):
        if each is not None and not bool((torch.isfinite(each) & (each >= 0)).all()):
            raise ValueError(f"{name} must be finite and at least 0")
    if weight is not None and not bool((weight > 0).any()):
        raise ValueError("weight must be positive for at least one point")
    w = torch.ones_like(value)
    if stderr is not None:
        # no point counts more than the spread of the values warrants
        floor = 0.02 * value.std(unbiased=False) + 1e-12
        w = (stderr.square() + floor.square()).reciprocal()
        w = w / w.mean()
    if weight is not None:
        w = w * weight
    return w / w.mean()


class _Scaled(nn.Module):
    """Buffers that standardise inputs and targets."""

    center: Tensor
    scale: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        for name, size, fill in (
            ("center", (dim,), 0.0),
            ("scale", (dim,), 1.0),
            ("mean", (), 0.0),
            ("spread", (), 1.0),
        ):
            self.register_buffer(name, torch.full(size, fill, dtype=dtype))

    def _frame(self, theta: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = theta.std(0, unbiased=False)
        spread = value.std(unbiased=False)
        return (
            theta.mean(0),
            torch.where(scale > 0, scale, torch.ones_like(scale)),
            value.mean(),
            torch.where(spread > 0, spread, torch.ones_like(spread)),
        )


class EnsembleSurrogate(_Scaled):
    """Networks on reweighted data, fitted as one; their disagreement is the standard deviation.

    Every member sees the points with its own exponential weights (the Bayesian bootstrap).

    Args:
        dim: F.
        members: networks; 1 has no bootstrap and std 0.
        hidden: hidden layers.
        act: activation.
        steps: full-batch steps of AdamW.
        lr: learning rate, falling linearly to 0.
        weight_decay: of the weights, not the biases.
        batch_norm: after each hidden layer's product, with running averages for predictions.
        generator: initial weights and bootstrap.
        warm_start: whether a second `fit` goes on from the present function.

    Example:
        >>> s = EnsembleSurrogate(2, generator=torch.Generator().manual_seed(0))
        >>> theta = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
        >>> mean, std = s.fit(theta, -theta.square().sum(1)).forward(torch.zeros(1, 2))
        >>> bool(mean > -0.6), bool(std < 1)
        (True, True)
    """

    def __init__(
        self,
        dim: int,
        *,
        members: int = 5,
        hidden: Sequence[int] = (32, 32),
        act: str = "silu",
        steps: int = 150,
        lr: float = 0.02,
        weight_decay: float = 1e-2,
        batch_norm: bool = False,
        warm_start: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(dim, dtype)
        if members < 1:
            raise ValueError(f"members must be at least 1, got {members}")
        self.members, self.steps, self.lr = members, steps, lr
        self.weight_decay, self.warm_start, self.fitted = weight_decay, warm_start, False
        self.generator = generator
        self.net = BatchedMLP(
            [dim],
            hidden,
            1,
            groups=members,
            act=act,
            norm=batch_norm,
            generator=generator,
            dtype=dtype,
        ).eval()

    def fit(
        self,
        theta: Tensor,
        value: Tensor,
        stderr: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> EnsembleSurrogate:
        """Fit to theta (P, F) and value (P,); returns self."""
        dtype = self.center.dtype
        weight = check_points(theta, value, stderr, weight).to(dtype)
        theta, value = theta.to(dtype), value.to(dtype)
        center, scale, mean, spread = self._frame(theta, value)
        if self.fitted and self.warm_start:  # the same function in the new frame
            self.net.change_input(0, scale / self.scale, (center - self.center) / self.scale)
            self.net.change_output(self.spread / spread, (self.mean - mean) / spread)
        for name, new in zip(
            ("center", "scale", "mean", "spread"), (center, scale, mean, spread), strict=True
        ):
            getattr(self, name).copy_(new)
        self.fitted = True
        u, target = (theta - center) / scale, (value - mean) / spread
        boot = torch.ones(self.members, len(value), dtype=dtype)
        if self.members > 1:
            draw = torch.rand(self.members, len(value), generator=self.generator, dtype=dtype)
            boot = -torch.log(draw.clamp_min(1e-9)).to(u.device)
        boot = boot.to(u.device) * weight
        boot = boot / boot.sum(1, keepdim=True)
        decay = [*self.net.first, *self.net.weights]
        optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": self.weight_decay},
                {"params": [*self.net.biases, *self.net.norms.parameters()], "weight_decay": 0.0},
            ],
            lr=self.lr,
            fused=True,
        )
        inputs = u.expand(self.members, -1, -1)
        self.net.train()
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / self.steps)
            error = self.net(inputs).squeeze(-1) - target
            optimizer.zero_grad()
            (boot * error.square()).sum().backward()
            optimizer.step()
        self.net.eval()
        return self

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (P,) over the members at theta (P, F)."""
        u = (theta - self.center) / self.scale
        out = self.net(u.expand(self.members, -1, -1)).squeeze(-1)
        mean = self.mean + self.spread * out.mean(0)
        if self.members == 1:
            return mean, torch.zeros_like(mean)
        return mean, self.spread * out.std(0)


class MLPSurrogate(EnsembleSurrogate):
    """The paper's surrogate: F → 10 → 20 → 10 → 1 with ELU, one network, no standard deviation.

    Without the released code's BatchNorm by default: with twenty points its statistics are the largest
    noise. `batch_norm=True` has it.

    Example:
        >>> MLPSurrogate(2)(torch.zeros(3, 2))[1]
        tensor([0., 0., 0.])
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 10,
        steps: int = 300,
        lr: float = 0.05,
        batch_norm: bool = False,
        warm_start: bool = False,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            dim,
            members=1,
            hidden=(width, 2 * width, width),
            act="elu",
            steps=steps,
            lr=lr,
            weight_decay=0.0,
            batch_norm=batch_norm,
            warm_start=warm_start,
            generator=generator,
            dtype=dtype,
        )


class QuadraticSurrogate(_Scaled):
    """Ridge regression on 1, z, z zᵀ, in closed form; the ridge is chosen by leave-one-out errors.

    Exact on quadratics where there are enough points. Float64 inside.

    Args:
        dim: F.
        ridges: candidates, relative to the largest squared singular value.

    Raises:
        ValueError: fewer than F + 2 points.

    Example:
        >>> theta = torch.randn(30, 2, dtype=torch.float64)
        >>> s = QuadraticSurrogate(2).fit(theta, 3 - theta.square().sum(1))
        >>> torch.allclose(s(torch.zeros(1, 2, dtype=torch.float64))[0], torch.tensor(3.0).double())
        True
    """

    coefficients: Tensor
    covariance: Tensor

    def __init__(
        self, dim: int, *, ridges: Sequence[float] = (1e-13, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)
    ) -> None:
        super().__init__(dim, torch.float64)
        self.ridges = tuple(ridges)
        size = 1 + dim + dim * (dim + 1) // 2
        self.register_buffer("coefficients", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(size, size, dtype=torch.float64))
        self.rows, self.columns = torch.triu_indices(dim, dim).tolist()

    def _features(self, theta: Tensor) -> Tensor:
        u = (theta - self.center) / self.scale
        return torch.cat([torch.ones_like(u[:, :1]), u, u[:, self.rows] * u[:, self.columns]], 1)

    def fit(
        self,
        theta: Tensor,
        value: Tensor,
        stderr: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> QuadraticSurrogate:
        """Fit to theta (P, F) and value (P,); returns self."""
        theta, value = theta.double(), value.double()
        weight = check_points(theta, value, stderr, weight).double()
        if theta.shape[0] < self.dim + 2:
            raise ValueError(
                f"a quadratic of {self.dim} parameters needs at least {self.dim + 2} designs, "
                f"got {theta.shape[0]}"
            )
        for name, new in zip(
            ("center", "scale", "mean", "spread"), self._frame(theta, value), strict=True
        ):
            getattr(self, name).copy_(new)
        root = weight.sqrt()
        phi = self._features(theta) * root[:, None]
        target = (value - self.mean) / self.spread * root
        u, s, vt = torch.linalg.svd(phi, full_matrices=False)
        best = None
        for ridge in self.ridges:
            shrink = s.square() / (s.square() + ridge * s[0].square())
            leverage = (u.square() @ shrink).clamp_max(1 - 1e-6)
            residual = target - u @ (shrink * (u.T @ target))
            error = (residual / (1 - leverage)).square().mean()
            if best is None or error < best[0]:
                best = (error, shrink, residual, ridge)
        assert best is not None
        _, shrink, residual, ridge = best
        self.coefficients.copy_(vt.T @ (shrink / s.clamp_min(1e-300) * (u.T @ target)))
        freedom = max(1.0, len(value) - float(shrink.sum()))
        noise = residual.square().sum() / freedom
        inverse = 1 / (s.square() + max(ridge, 1e-6) * s[0].square())
        self.covariance.copy_(noise * (vt.T * inverse) @ vt)
        return self

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (P,) at theta (P, F), in theta's dtype."""
        phi = self._features(theta.double())
        mean = self.mean + self.spread * (phi @ self.coefficients)
        variance = ((phi @ self.covariance) * phi).sum(1)
        return mean.to(theta.dtype), (self.spread * (variance + 1e-24).sqrt()).to(theta.dtype)


class GPSurrogate(nn.Module):
    """BoTorch's `SingleTaskGP` with known noise (extra `botorch`).

    Args:
        dim: F.

    Raises:
        MissingExtra: BoTorch is not installed.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        try:
            import botorch  # noqa: F401
        except ImportError as error:
            raise missing("botorch", "botorch") from error
        self.dim = dim
        self.model: Any = None
        self._data: tuple[Tensor, Tensor, Tensor] | None = None

    def fit(
        self,
        theta: Tensor,
        value: Tensor,
        stderr: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> GPSurrogate:
        """Fit to theta (P, F) and value (P,); a weight below 1 raises the noise of a point."""
        import warnings

        from botorch.fit import fit_gpytorch_mll
        from gpytorch.mlls import ExactMarginalLogLikelihood

        theta, value = theta.double(), value.double()
        check_points(theta, value, stderr, weight)
        spread = value.std(unbiased=False) + 1e-12
        floor = (1e-3 * spread).square()
        noise = floor.expand_as(value) if stderr is None else stderr.double().square() + floor
        if weight is not None:
            noise = noise / weight.double().clamp_min(1e-3)
        self._build(theta, value, noise)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_gpytorch_mll(ExactMarginalLogLikelihood(self.model.likelihood, self.model))
        return self

    def _build(self, theta: Tensor, value: Tensor, noise: Tensor) -> None:
        import warnings

        from botorch.models import SingleTaskGP
        from botorch.models.transforms import Standardize

        self._data = (theta, value, noise)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = SingleTaskGP(
                theta, value[:, None], noise[:, None], outcome_transform=Standardize(1)
            )

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (P,) at theta (P, F), in theta's dtype."""
        if self.model is None:
            raise RuntimeError("call fit before forward")
        posterior = self.model.posterior(theta.double())
        mean, variance = posterior.mean[:, 0], posterior.variance[:, 0]
        return mean.to(theta.dtype), variance.clamp_min(0).sqrt().to(theta.dtype)

    def get_extra_state(self) -> Any:
        """Return the data, from which `set_extra_state` builds the model."""
        return self._data

    def set_extra_state(self, state: Any) -> None:
        """Take the data of another surrogate."""
        if state is not None:
            self._build(*state)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Build the model from the data and take its hyperparameters."""
        self.set_extra_state(state_dict["_extra_state"])
        return super().load_state_dict(state_dict, strict, assign)


SURROGATES = ("ensemble", "mlp", "quadratic", "gp")


def make_surrogate(
    surrogate: str | nn.Module,
    dim: int,
    *,
    warm_start: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Return a surrogate by name ("ensemble", "mlp", "quadratic", "gp"), or a copy of an instance.

    Args:
        surrogate: a name, or a module with `fit(theta, value, stderr, weight)` and
            `forward(theta) -> (mean, std)`.
        dim: F.
        warm_start: whether a second fit goes on from the first one's function.
        generator: of a named network's initial weights.

    Example:
        >>> type(make_surrogate("quadratic", 3)).__name__
        'QuadraticSurrogate'
        >>> make_surrogate(EnsembleSurrogate(3, members=8), 3).members
        8
    """
    if isinstance(surrogate, nn.Module):
        if not callable(getattr(surrogate, "fit", None)):
            raise TypeError(f"a surrogate needs a method fit, {type(surrogate).__name__} has none")
        if getattr(surrogate, "dim", dim) != dim:
            raise ValueError(
                f"the surrogate is of {surrogate.dim} parameters, the design space has {dim}"
            )
        copied = copy.deepcopy(surrogate)
        if isinstance(copied, EnsembleSurrogate):
            copied.warm_start = warm_start
        return copied
    if surrogate not in SURROGATES:
        raise ValueError(
            f"surrogate must be a module or one of {', '.join(SURROGATES)}, got {surrogate!r}"
        )
    if surrogate == "ensemble":
        return EnsembleSurrogate(dim, warm_start=warm_start, generator=generator)
    if surrogate == "mlp":
        return MLPSurrogate(dim, warm_start=warm_start, generator=generator)
    return QuadraticSurrogate(dim) if surrogate == "quadratic" else GPSurrogate(dim)
