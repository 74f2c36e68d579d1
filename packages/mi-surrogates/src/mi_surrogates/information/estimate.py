"""`MutualInformation`: one data set (x, y), any of eight methods, with an error and a null."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mi_surrogates.errors import DegenerateData
from mi_surrogates.information.estimator import LOWER_BOUNDS, BatchedEstimator, Settings

Array = np.ndarray | Tensor


@dataclass(frozen=True)
class Null:
    """Estimates after the pairing of x and y was destroyed.

    Attributes:
        values: (n,) estimates on permuted data; their mean is the bias at independence.
        p_value: share of permuted estimates, the observed one included, that are not below it.
    """

    values: Tensor
    p_value: float

    @property
    def bias(self) -> float:
        """The mean of the permuted estimates."""
        return float(self.values.mean())


@dataclass(frozen=True)
class MIEstimate:
    """An estimate of I(X; Y).

    Attributes:
        value: in `units`; it may be negative, since it is an estimate.
        stderr: standard error from the events that were scored.
        units: "nats" or "bits".
        curve: held-out values during training, in nats.
        converged: whether the held-out value stopped rising before the steps were spent.
        saturated: the value is within 1 nat of the logarithm of the number of events, above which no
            bound of this kind can honestly go; use "ba".
        bound: "lower" or "none".
    """

    value: float
    stderr: float
    units: str
    curve: tuple[float, ...]
    converged: bool
    saturated: bool
    bound: str
    _source: tuple[Any, ...] = field(repr=False, compare=False, default=())

    def null(self, n: int = 20) -> Null:
        """Estimate again with y permuted n times, as one batch.

        Args:
            n: permutations; the smallest p-value is 1 / (n + 1).

        Example:
            >>> x = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
            >>> mutual_information(x, x + x.roll(1, 0)).null(9).p_value
            0.1
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        owner, fit, score = self._source
        values = owner._null_values(n, fit, score)
        above = int((values >= self.value).sum())
        return Null(values, (above + 1) / (n + 1))


def as_events(values: Array, name: str) -> Tensor:
    """Return (N, d) events as a floating-point tensor; more dimensions are flattened.

    Raises:
        ValueError: not numeric, empty or not finite.

    Example:
        >>> as_events(np.zeros((5, 2, 3)), "y").shape
        torch.Size([5, 6])
    """
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name} must be real numbers, got dtype {array.dtype}")
        values = torch.from_numpy(np.ascontiguousarray(array))
    if values.is_complex():
        raise ValueError(f"{name} must be real numbers, got {values.dtype}")
    if values.dim() == 0 or values.shape[0] == 0:
        raise ValueError(f"{name} must have one row for each event, got {tuple(values.shape)}")
    values = values if values.is_floating_point() else values.double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} has NaN or infinite values")
    return values.reshape(values.shape[0], -1)


class MutualInformation:
    """Estimate I(X; Y) from samples.

    Args:
        method: "mine" (Donsker–Varadhan), "nwj", "infonce", "js" (trained by Jensen–Shannon, reported by
            Donsker–Varadhan), "smile", "ba" (Barber–Agakov: H(X) + E log q(x|y)), "ksg" or "gaussian".
        hidden: hidden layers of the network.
        units: "nats" or "bits".
        max_steps: minibatches at most.
        batch_size: events in a minibatch; for "infonce" also the size of a block, which caps the value at
            its logarithm.
        standardize: divide every column by its standard deviation on the training events.
        holdout: share of the events that `mutual_information` keeps for the score.
        device: of the network.
        generator: a torch.Generator for weights, minibatches and permutations; seed 0 by default.
        dtype: of the network.
        **options: `critic` ("joint", "paper"), `output_activation` (None; "tanh" as the authors' code),
            `lr` (3e-3), `ema` (0.01, None for the plain gradient), `tau` (5, for "smile"), `k` (3, for
            "ksg"), `negatives` (4 re-pairings a minibatch), `repairings` (32, for the value), `validation`
            (0.25 of the training events, for early stopping), `check_every` (50), `patience` (10),
            `components` (1) and `classes` (0) of the "ba" decoder, `x_entropy` (H(X) in nats, for "ba";
            estimated if None), `transform` ("rank" for normal scores of every column).

    Raises:
        ValueError: an unknown name or a value out of range.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(4000, 1, generator=g)
        >>> y = 0.9 * x + 0.19**0.5 * torch.randn(4000, 1, generator=g)
        >>> mi = MutualInformation("ba", hidden=(16,), max_steps=300)
        >>> est = mi.fit(x[:2000], y[:2000]).score(x[2000:], y[2000:])
        >>> abs(est.value - 0.830366) < 0.1
        True
    """

    def __init__(
        self,
        method: str = "mine",
        *,
        hidden: tuple[int, ...] = (64, 64),
        units: str = "nats",
        max_steps: int = 2000,
        batch_size: int = 256,
        standardize: bool = True,
        holdout: float = 0.5,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        if units not in ("nats", "bits"):
            raise ValueError(f"units must be 'nats' or 'bits', got {units!r}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout must be in (0, 1), got {holdout}")
        self.settings = Settings(
            method, hidden, batch_size=batch_size, standardize=standardize, **options
        )
        self.units, self.max_steps, self.holdout = units, max_steps, holdout
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.estimator: BatchedEstimator | None = None
        self._fitted: tuple[Tensor, Tensor] | None = None

    def fit(self, x: Array, y: Array) -> MutualInformation:
        """Train on x (N, dx) and y (N, dy[, ...]); a part is held out to stop early. Returns self.

        Raises:
            ValueError: lengths differ, too few events, values that are not finite.
            DegenerateData: x or y is constant.
        """
        tx, ty = self._pair(x, y)
        if self.settings.trained and tx.shape[0] < 50:
            raise ValueError(f"training needs at least 50 events, got {tx.shape[0]}")
        if self.settings.trained and self.settings.batch_size > tx.shape[0]:
            raise ValueError(
                f"batch_size {self.settings.batch_size} is above the {tx.shape[0]} events"
            )
        self._fitted = (tx, ty)
        self.estimator = self._estimator(1, tx.shape[1], ty.shape[1])
        self.estimator.fit(tx[None], ty[None], steps=self.max_steps)
        return self

    def score(self, x: Array, y: Array) -> MIEstimate:
        """Return the estimate on events that were not trained on.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if self.estimator is None or self._fitted is None:
            raise RuntimeError("call fit(x, y) before score(x, y)")
        tx, ty = self._pair(x, y)
        value, stderr = (float(v[0]) for v in self.estimator.evaluate(tx[None], ty[None]))
        saturated = value > self.estimator.limit(tx.shape[0])
        if saturated:
            warnings.warn(
                f"{value:.2f} nats from {tx.shape[0]} events is more than a bound of this kind can show; "
                "take more events, or method='ba'",
                stacklevel=2,
            )
        curve = tuple(float(v[0]) for v in self.estimator.curve)
        checks = 1 + -(-self.max_steps // self.settings.check_every)
        late = curve[-max(2, len(curve) // 4) :]
        settled = (
            not curve
            or len(curve) < checks
            or max(late) - max(curve) < 0
            or (late[-1] - late[0] < 0.02)
        )
        scale = 1 / math.log(2) if self.units == "bits" else 1.0
        known = self.settings.method != "ba" or self.settings.x_entropy is not None
        bound = "lower" if self.settings.method in LOWER_BOUNDS and known else "none"
        return MIEstimate(
            value * scale,
            stderr * scale,
            self.units,
            curve,
            settled,
            saturated,
            bound,
            (self, self._fitted, (tx, ty)),
        )

    def _pair(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        tx, ty = as_events(x, "x"), as_events(y, "y")
        if tx.shape[0] != ty.shape[0]:
            raise ValueError(f"x has {tx.shape[0]} events and y has {ty.shape[0]}")
        if self.settings.classes and not bool(
            ((tx >= 0) & (tx < self.settings.classes) & (tx == tx.round())).all()
        ):
            raise ValueError(f"x must be labels 0 .. {self.settings.classes - 1}")
        if tx.shape[0] < 2:
            raise ValueError(f"at least 2 events are needed, got {tx.shape[0]}")
        for name, values in (("x", tx), ("y", ty)):
            if bool((values == values[:1]).all()):
                raise DegenerateData(f"{name} is the same in all events: there is no signal")
        return tx, ty

    def _estimator(self, groups: int, dim_x: int, dim_y: int) -> BatchedEstimator:
        return BatchedEstimator(
            self.settings,
            dim_x,
            dim_y,
            groups=groups,
            generator=self.generator,
            device=self.device,
            dtype=self.dtype,
        )

    def _null_values(
        self, n: int, fitted: tuple[Tensor, Tensor], scored: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return n estimates with y permuted, in the estimate's units."""
        estimator = self._estimator(n, fitted[0].shape[1], fitted[1].shape[1])

        def permuted(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, y = pair
            size = y.shape[0]
            orders = [torch.randperm(size, generator=self.generator) for _ in range(n)]
            return x.expand(n, -1, -1), torch.stack([y[order.to(y.device)] for order in orders])

        estimator.fit(*permuted(fitted), steps=self.max_steps)
        values = estimator.evaluate(*permuted(scored))[0]
        return values / math.log(2) if self.units == "bits" else values


def mutual_information(x: Array, y: Array, method: str = "ksg", **options: Any) -> MIEstimate:
    """Estimate I(X; Y) in one call.

    Args:
        x: (N, dx) samples, or (N,).
        y: (N, dy[, ...]) samples, or (N,).
        method: as in `MutualInformation`. Methods with a network are trained on one part of the events and
            scored on the other (`holdout`); "ksg" and "gaussian" use all of them.
        **options: of `MutualInformation`.

    Example:
        >>> x = torch.randn(500, generator=torch.Generator().manual_seed(0))
        >>> est = mutual_information(x, x + x.roll(1, 0), units="bits")
        >>> 0 < est.stderr < est.value
        True
    """
    mi = MutualInformation(method, **options)
    tx, ty = mi._pair(x, y)
    if not mi.settings.trained:
        return mi.fit(tx, ty).score(tx, ty)
    order = torch.randperm(tx.shape[0], generator=mi.generator).to(tx.device)
    held = max(2, round(mi.holdout * tx.shape[0]))
    return mi.fit(tx[order[held:]], ty[order[held:]]).score(tx[order[:held]], ty[order[:held]])
