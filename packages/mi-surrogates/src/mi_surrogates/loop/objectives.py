"""What is maximised: information (MI-OPT), minus a reconstruction loss (RECO-OPT), or the user's own."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mi_surrogates.errors import DegenerateData
from mi_surrogates.information.estimator import BatchedEstimator, Frame, Settings
from mi_surrogates.information.networks import Reconstruction
from mi_surrogates.information.training import make_adam, train
from mi_surrogates.loop.checks import check_training

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """The events of one iteration.

    Attributes:
        theta: (M, F) designs.
        x: (M, N, dx) true quantities.
        y: (M, N, dy) measurements.
        center: (F,) what θ is centred on for the networks.
        sigma: (F,) what it is divided by.
        seed: of the networks and minibatches.
        warm: whether networks go on from the last iteration.
    """

    theta: Floats
    x: Tensor
    y: Tensor
    center: Floats
    sigma: Floats
    seed: int
    warm: bool = True

    def check(self) -> None:
        """Raise `DegenerateData` if there is nothing to learn from."""
        if bool((self.x == self.x[:1, :1]).all()):
            raise DegenerateData("x is the same in all events: there is no signal to measure")
        if bool((self.y == self.y[:1, :1]).all()):
            raise DegenerateData(
                "y is the same in all events of all designs: the design has no influence"
            )

    def framed_theta(self, dtype: torch.dtype, device: Any) -> Tensor:
        """Return the standardised designs."""
        framed = (self.theta - self.center) / self.sigma
        return torch.from_numpy(framed).to(dtype=dtype, device=device)

    def split(self, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the events to fit and those to evaluate; the same ones in every design."""
        events = self.x.shape[1]
        order = torch.randperm(events, generator=generator)
        held = max(2, round(share * events))
        return order[held:], order[:held]


class Objective(Protocol):
    """Anything with these three methods; higher values are better."""

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the values (M,) and their standard errors (M,), float64."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the other objective was."""
        ...


def _reframe(net: Any, old: tuple[Floats, Floats], batch: Batch) -> None:
    """Re-express θ exactly: u_old = (σ/σ_old) u + (center − center_old)/σ_old."""
    center, sigma = old
    net.change_theta(
        torch.from_numpy(batch.sigma / sigma), torch.from_numpy((batch.center - center) / sigma)
    )


class MIObjective:
    """I(X; Y | θ) of every design, in nats, on events that were not trained on.

    Args:
        method: see `MutualInformation`.
        amortized: one network T(x, y, θ) for all designs; otherwise one network each, trained as one.
        steps: minibatches in an iteration.
        batch_size: events of each design in a minibatch.
        holdout: share of the events for the value.
        device: of the network.
        dtype: of the network.
        **options: of `MutualInformation`, e.g. `hidden`, `lr`, `x_entropy`, `classes`; `negatives` is 1
            and `hidden` (48, 48).

    Example:
        >>> x = torch.randn(4, 200, 1, generator=torch.Generator().manual_seed(0))
        >>> scale = torch.tensor([0.1, 0.2, 0.4, 0.8])[:, None, None]
        >>> batch = Batch(scale[:, :, 0].double().numpy(), x, x + scale * x.flip(1),
        ...               np.zeros(1), np.ones(1), 0)
        >>> value, stderr = MIObjective("gaussian").evaluate(batch)
        >>> bool((value.diff() < 0).all())
        True
    """

    def __init__(
        self,
        method: str = "mine",
        *,
        amortized: bool = True,
        steps: int = 100,
        batch_size: int = 48,
        holdout: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not 0 < holdout < 1:
            raise ValueError(f"holdout must be in (0, 1), got {holdout}")
        options = {"negatives": 1, "hidden": (48, 48), **options}
        self.settings = Settings(method, batch_size=batch_size, **options)
        self.amortized, self.steps, self.holdout = amortized, steps, holdout
        self.device, self.dtype = device, dtype
        self._estimator: BatchedEstimator | None = None
        self._frame: tuple[Floats, Floats] | None = None

    def check_events(self, events: int) -> None:
        """Raise ValueError if a design has too few events for the method."""
        if self.settings.trained:
            check_training(events, self.settings.batch_size)
        elif self.settings.method == "ksg" and self.settings.k >= events:
            raise ValueError(f"k must be below the {events} events, got {self.settings.k}")

    def _make(self, groups: int, sizes: tuple[int, int, int]) -> BatchedEstimator:
        dim_x, dim_y, dim_theta = sizes
        return BatchedEstimator(
            self.settings,
            dim_x,
            dim_y,
            dim_theta if self.amortized else 0,
            groups=groups,
            generator=self._generator,
            device=self.device,
            dtype=self.dtype,
        )

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Train on one part of the events and return values and standard errors on the other."""
        batch.check()
        self._generator = torch.Generator().manual_seed(batch.seed)
        designs = batch.x.shape[0]
        groups = 1 if self.amortized else designs
        theta = batch.framed_theta(self.dtype, self.device) if self.amortized else None
        fit, held = batch.split(self.holdout, self._generator)
        if not self.settings.trained:
            fit = held = torch.arange(batch.x.shape[1])
        old = self._estimator
        if old is None or not batch.warm or old.groups != groups:
            sizes = (batch.x.shape[2], batch.y.shape[2], batch.theta.shape[1])
            self._sizes = sizes
            self._estimator = self._make(groups, sizes)
        elif self._frame is not None:
            old.generator = self._generator
            if self.amortized:
                _reframe(old, self._frame, batch)
        self._frame = (batch.center, batch.sigma)
        assert self._estimator is not None
        self._estimator.curve = []
        self._estimator.fit(batch.x[:, fit], batch.y[:, fit], theta, steps=self.steps)
        if self.settings.trained:
            return self._estimator.evaluate(batch.x[:, held], batch.y[:, held], theta)
        return self._by_design(self._estimator, batch)

    @staticmethod
    def _by_design(estimator: BatchedEstimator, batch: Batch) -> tuple[Tensor, Tensor]:
        """Evaluate all designs; where some are degenerate, these get NaN and the others are kept."""
        try:
            return estimator.evaluate(batch.x, batch.y)
        except DegenerateData:
            found, reasons = [], []
            for x, y in zip(batch.x, batch.y, strict=True):
                try:
                    found.append(estimator.evaluate(x[None], y[None]))
                except DegenerateData as error:
                    found.append((torch.tensor([math.nan]).double(),) * 2)
                    reasons.append(str(error))
            if len(reasons) == len(found):
                raise
        warnings.warn(
            f"{len(reasons)} of {len(found)} designs have no estimate: {reasons[0]}", stacklevel=4
        )
        return torch.cat([v for v, _ in found]), torch.cat([e for _, e in found])

    def state_dict(self) -> dict[str, Any]:
        """Return the network and its optimizer."""
        if self._estimator is None or self._frame is None:
            return {}
        state = {
            "estimator": self._estimator.state_dict(),
            "sizes": list(self._sizes),
            "groups": self._estimator.groups,
            "frame": [torch.from_numpy(part) for part in self._frame],
        }
        return copy.deepcopy(state)  # Adam's moments would be shared with whoever loads it

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the other objective was."""
        if not state:
            return
        self._generator = torch.Generator().manual_seed(0)
        a, b, c = state["sizes"]
        self._sizes = (a, b, c)
        self._estimator = self._make(state["groups"], self._sizes)
        self._estimator.load_state_dict(state["estimator"])
        center, sigma = (part.numpy() for part in state["frame"])
        self._frame = (center, sigma)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scaled": lambda guess, x: ((guess - x).square() / (x.abs() + 1)).mean(-1),
    "mse": lambda guess, x: (guess - x).square().mean(-1),
    "relative": lambda guess, x: ((guess - x).square() / x.clamp_min(1).square()).mean(-1),
}


class RecoObjective:
    """−log of the mean loss of a reconstruction x̂ = r(y, θ), on events that were not trained on.

    Args:
        loss: "scaled" ((x̂ − x)²/(abs(x) + 1), AIDO), "mse", "relative" ((x̂ − x)²/max(x, 1)²), or a
            function of x̂ and x (..., dx) that returns (...), in physical units.
        log: take −log of the mean loss, which makes it free of scale; otherwise −mean.
        hidden: hidden layers.
        gated: AIDO's network, whose gate g(θ) multiplies y.
        steps: minibatches in an iteration.
        batch_size: events of each design in a minibatch.
        lr: Adam's learning rate.
        holdout: share of the events for the value.
        validation: share of the others for early stopping.
        device: of the network.
        dtype: of the network.

    A design with a prediction that is not finite gets the value NaN, and the loop counts it as failed.

    Example:
        >>> x = torch.rand(4, 200, 1, generator=torch.Generator().manual_seed(0))
        >>> scale = torch.tensor([0.01, 0.1, 0.4, 1.6])[:, None, None]
        >>> batch = Batch(scale[:, :, 0].double().numpy(), x, x + scale * x.flip(1),
        ...               np.zeros(1), np.ones(1), 0)
        >>> value, _ = RecoObjective(steps=100, hidden=(16,)).evaluate(batch)
        >>> bool(value[0] > value[3])
        True
    """

    def __init__(
        self,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "scaled",
        *,
        log: bool = True,
        hidden: Sequence[int] = (48, 48),
        gated: bool = False,
        steps: int = 100,
        batch_size: int = 48,
        lr: float = 3e-3,
        holdout: float = 0.5,
        validation: float = 0.25,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss must be a function or one of {', '.join(LOSSES)}, got {loss!r}")
        for name, value in (("holdout", holdout), ("validation", validation)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        if steps < 1 or batch_size < 1:
            raise ValueError(f"steps and batch_size must be positive, got {steps}, {batch_size}")
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.log, self.hidden, self.gated = log, tuple(hidden), gated
        self.steps, self.batch_size, self.lr = steps, batch_size, lr
        self.holdout, self.validation = holdout, validation
        self.device, self.dtype = device, dtype
        self._net: Reconstruction | None = None
        self._frame: tuple[Floats, Floats] | None = None

    def check_events(self, events: int) -> None:
        """Raise ValueError if a design has too few events to train on."""
        check_training(events, self.batch_size)

    def _start(self, sizes: tuple[int, int, int], generator: torch.Generator) -> None:
        self._sizes = sizes
        self._net = Reconstruction(
            *sizes, hidden=self.hidden, gated=self.gated, generator=generator, dtype=self.dtype
        ).to(self.device)
        self._adam = make_adam(self._net, self.lr)

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Train on one part of the events and return values and standard errors on the other."""
        batch.check()
        generator = torch.Generator().manual_seed(batch.seed)
        x = batch.x.to(device=self.device, dtype=self.dtype)
        y = batch.y.to(device=self.device, dtype=self.dtype)
        theta = batch.framed_theta(self.dtype, self.device)
        fit, held = batch.split(self.holdout, generator)
        fresh = self._net is None or not batch.warm
        if fresh:
            self._start((x.shape[2], y.shape[2], theta.shape[1]), generator)
            flat = x.reshape(-1, x.shape[2])
            self._mean, self._scale = flat.mean(0), flat.std(0).clamp_min(1e-12)
        elif self._frame is not None:
            _reframe(self._net, self._frame, batch)
        self._frame = (batch.center, batch.sigma)
        net, mean, scale = self._net, self._mean, self._scale
        assert net is not None
        # every design's instrument is calibrated on its own events to fit
        y = Frame(y[:, fit], by_design=True)(y)

        def events_loss(x: Tensor, y: Tensor, theta: Tensor | None) -> Tensor:
            assert theta is not None
            assert net is not None
            return self.loss(mean + scale * net(y, theta), x)

        def training_loss(x: Tensor, y: Tensor, theta: Tensor | None) -> Tensor:
            value = events_loss(x, y, theta).mean(1)
            # as in the objective: designs count by their relative loss
            return torch.log(value + 1e-12) if self.log else value

        check = max(2, round(self.validation * len(fit)))
        stop, fit = fit[:check], fit[check:]
        train(
            net,
            training_loss,
            lambda: -training_loss(x[:, stop], y[:, stop], theta).mean()[None],
            (x[:, fit], y[:, fit], theta),
            steps=self.steps,
            batch_size=min(self.batch_size, len(fit)),
            lr=self.lr,
            generator=generator,
            optimizer=self._adam,
        )
        with torch.no_grad():
            losses = events_loss(x[:, held], y[:, held], theta).double().cpu()
        average = losses.mean(1)
        stderr = losses.std(1) / math.sqrt(losses.shape[1])
        if self.log:
            return -torch.log(average), stderr / average
        return -average, stderr

    def state_dict(self) -> dict[str, Any]:
        """Return the network and its optimizer."""
        if self._net is None or self._frame is None:
            return {}
        state = {
            "net": self._net.state_dict(),
            "optimizer": self._adam.state_dict(),
            "sizes": list(self._sizes),
            "scale": [self._mean, self._scale],
            "frame": [torch.from_numpy(part) for part in self._frame],
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the other objective was."""
        if not state:
            return
        a, b, c = state["sizes"]
        self._start((a, b, c), torch.Generator().manual_seed(0))
        assert self._net is not None
        self._net.load_state_dict(state["net"])
        self._adam.load_state_dict(state["optimizer"])
        self._mean, self._scale = (part.to(self.device) for part in state["scale"])
        center, sigma = (part.numpy() for part in state["frame"])
        self._frame = (center, sigma)


class CallableObjective:
    """A function of one design's events: f(theta (F,), x (N, dx), y (N, dy)) → value or (value, stderr).

    Example:
        >>> mean = CallableObjective(lambda theta, x, y: (y.mean(), y.std() / len(y) ** 0.5))
        >>> batch = Batch(np.zeros((2, 1)), torch.zeros(2, 3, 1), torch.ones(2, 3, 1),
        ...               np.zeros(1), np.ones(1), 0)
        >>> mean.evaluate(batch)[0].tolist()
        [1.0, 1.0]
    """

    def __init__(self, function: Callable[[Floats, Tensor, Tensor], Any]) -> None:
        self.function = function

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Call the function for every design; a missing standard error is 0."""
        rows = []
        for theta, x, y in zip(batch.theta, batch.x, batch.y, strict=True):
            found = self.function(theta, x, y)
            value, stderr = found if isinstance(found, tuple) else (found, 0.0)
            rows.append((float(value), float(stderr)))
        both = torch.tensor(rows, dtype=torch.float64)
        return both[:, 0], both[:, 1]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a function has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def make_objective(
    objective: str | Objective, device: Any = None, dtype: torch.dtype = torch.float32
) -> Objective:
    """Return the objective of a name: "mi" or "reco".

    Example:
        >>> type(make_objective("mi")).__name__
        'MIObjective'
    """
    if objective == "mi":
        return MIObjective(device=device, dtype=dtype)
    if objective == "reco":
        return RecoObjective(device=device, dtype=dtype)
    if isinstance(objective, str):
        raise ValueError(  # noqa: TRY004 (an unknown name)
            f"objective must be 'mi', 'reco' or an Objective, got {objective!r}"
        )
    return objective
