"""Estimates for many designs at once: what `MutualInformation` and the objectives are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mi_surrogates.errors import DegenerateData
from mi_surrogates.information import bounds
from mi_surrogates.information.gaussian import gaussian_terms
from mi_surrogates.information.knn import entropy_knn, ksg_terms
from mi_surrogates.information.networks import Decoder, JointCritic, PaperCritic
from mi_surrogates.information.training import make_adam, train

METHODS = ("mine", "nwj", "infonce", "js", "smile", "ba", "ksg", "gaussian")
LOWER_BOUNDS = ("mine", "nwj", "infonce", "js", "ba")


@dataclass(frozen=True)
class Settings:
    """How to estimate; the arguments of `MutualInformation` have the explanations."""

    method: str = "mine"
    hidden: tuple[int, ...] = (64, 64)
    critic: str = "joint"
    output_activation: str | None = None
    batch_size: int = 256
    lr: float = 3e-3
    ema: float | None = 0.01
    tau: float = 5.0
    k: int = 3
    negatives: int = 4
    repairings: int = 32
    validation: float = 0.25
    check_every: int = 50
    patience: int = 10
    components: int = 1
    classes: int = 0
    x_entropy: float | None = None
    standardize: bool = True
    transform: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.critic not in ("joint", "paper"):
            raise ValueError(f"critic must be 'joint' or 'paper', got {self.critic!r}")
        if self.transform not in (None, "rank"):
            raise ValueError(f"transform must be None or 'rank', got {self.transform!r}")
        if self.ema is not None and not 0 < self.ema <= 1:
            raise ValueError(f"ema must be None or in (0, 1], got {self.ema}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be in (0, 1), got {self.validation}")
        for name in ("batch_size", "k", "negatives", "repairings", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not self.tau > 0:
            raise ValueError(f"lr and tau must be positive, got {self.lr} and {self.tau}")

    @property
    def trained(self) -> bool:
        """Whether the method has a network."""
        return self.method not in ("ksg", "gaussian")


class Frame:
    """Standardisation of events: one for all designs, or one for each.

    Mutual information does not change under an invertible map of y that depends on the design alone,
    so that y may be standardised within each design.
    """

    def __init__(self, values: Tensor, *, by_design: bool, rank: bool = False) -> None:
        flat = values if by_design else values.reshape(1, -1, values.shape[-1])
        self.mean = flat.mean(1, keepdim=True)
        scale = flat.std(1, keepdim=True, unbiased=False)
        self.scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.order = flat.mT.contiguous().sort(-1).values if rank else None

    def __call__(self, values: Tensor) -> Tensor:
        """Return standardised values, or their normal scores."""
        if self.order is None:
            return (values - self.mean) / self.scale
        wanted = values.mT.contiguous()
        order = self.order.expand(wanted.shape[0], -1, -1).contiguous()
        places = [torch.searchsorted(order, wanted, right=right) for right in (False, True)]
        share = (places[0] + places[1] + 1).to(values.dtype) / (2 * order.shape[-1] + 2)
        scores: Tensor = torch.special.ndtri(share).mT
        return scores


class BatchedEstimator:
    """Mutual information of M designs from their events, by any method, with standard errors.

    Args:
        settings: what to do.
        dim_x: columns of x.
        dim_y: columns of y.
        dim_theta: columns of the designs that the network sees; 0 for none.
        groups: 1 for one network for all designs, M for one each.
        generator: initial weights and minibatches.
        device: where the network lives.
        dtype: of the network.
    """

    def __init__(
        self,
        settings: Settings,
        dim_x: int,
        dim_y: int,
        dim_theta: int = 0,
        *,
        groups: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings, self.dtype, self.device = settings, dtype, device
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.net: nn.Module | None = None
        if settings.method == "ba":
            self.net = Decoder(
                dim_x,
                dim_y,
                dim_theta,
                hidden=settings.hidden,
                groups=groups,
                components=settings.components,
                classes=settings.classes,
                generator=self.generator,
                dtype=dtype,
            )
        elif settings.trained and settings.critic == "paper":
            self.net = PaperCritic(
                dim_x,
                dim_y,
                dim_theta,
                groups=groups,
                output_activation=settings.output_activation,
                generator=self.generator,
                dtype=dtype,
            )
        elif settings.trained:
            self.net = JointCritic(
                dim_x,
                dim_y,
                dim_theta,
                hidden=settings.hidden,
                groups=groups,
                output_activation=settings.output_activation,
                generator=self.generator,
                dtype=dtype,
            )
        self.groups = groups
        self.optimizer: torch.optim.Adam | None = None
        if self.net is not None:
            self.net.to(device)
            self.optimizer = make_adam(self.net, settings.lr)
        self.frame_x: Frame | None = None
        self.frame_y: Frame | None = None
        self.curve: list[Tensor] = []

    def prepare(self, values: Tensor) -> Tensor:
        """Move events to the network's device and type."""
        return values.to(device=self.device, dtype=self.dtype)

    def set_frames(self, x: Tensor, y: Tensor) -> None:
        """Take the standardisation from these events; that of x is taken once and then kept."""
        rank = self.settings.transform == "rank"
        if self.frame_x is None:
            if bool((x.amax((0, 1)) == x.amin((0, 1))).all()):
                raise DegenerateData("x is the same in all events: there is no signal to measure")
            self.frame_x = Frame(x, by_design=False, rank=rank)
        self.frame_y = Frame(y, by_design=True, rank=rank)

    def framed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised events."""
        assert self.frame_x is not None
        assert self.frame_y is not None
        if not self.settings.standardize and self.settings.transform is None:
            return x, y
        return x if self.settings.classes else self.frame_x(x), self.frame_y(y)

    def log_volume(self) -> Tensor | float:
        """Return Σ log scale of x's standardisation, the difference of its entropies."""
        if self.frame_x is None or self.settings.classes or not self.settings.standardize:
            return 0.0
        return self.frame_x.scale.log().sum()

    def fit(self, x: Tensor, y: Tensor, theta: Tensor | None = None, *, steps: int) -> None:
        """Train on events x (M, N, dx), y (M, N, dy), of which a share is held out to stop early.

        Raises:
            DegenerateData: x is the same in all events.
        """
        x, y = self.prepare(x), self.prepare(y)
        self.set_frames(x, y)
        if self.net is None:
            return
        settings = self.settings
        x, y = self.framed(x, y)
        theta = None if theta is None else self.prepare(theta)
        held = max(2, round(settings.validation * x.shape[1]))
        state: list[Tensor | None] = [None]

        def loss(x: Tensor, y: Tensor, theta: Tensor | None) -> Tensor:
            return self._loss(x, y, theta, state)

        def validate() -> Tensor:
            values = self._terms(x[:, :held], y[:, :held], theta, min(8, settings.repairings))[0]
            return values.reshape(self.groups, -1).mean(1)

        self.curve += train(
            self.net,
            loss,
            validate,
            (x[:, held:], y[:, held:], theta),
            steps=steps,
            batch_size=min(settings.batch_size, x.shape[1] - held),
            lr=settings.lr,
            generator=self.generator,
            optimizer=self.optimizer,
            check_every=settings.check_every,
            patience=settings.patience,
            clip=1.0 if settings.method == "nwj" else None,
        )

    def _loss(
        self, x: Tensor, y: Tensor, theta: Tensor | None, state: list[Tensor | None]
    ) -> Tensor:
        """Return the training loss (M,) of a minibatch."""
        settings, net = self.settings, self.net
        assert net is not None
        if settings.method == "ba":
            return -net(x, y, theta).mean(1)  # type: ignore[no-any-return]
        if settings.method == "infonce":
            return -bounds.infonce(all_pairs(net, x, y, theta))
        # row i of the minibatch is an independent draw: a shift pairs it with another event
        shifts = range(1, min(settings.negatives, x.shape[1] - 1) + 1)
        size = x.shape[1]
        others = torch.cat([y, *(y.roll(shift, 1) for shift in shifts)], 1)
        scores = net(x.repeat(1, len(shifts) + 1, 1), others, theta)
        pos, neg = scores[:, :size], scores[:, size:]
        if settings.method == "nwj":
            return -bounds.nwj(pos, neg)
        if settings.method in ("js", "smile"):
            return -bounds.js(pos, neg)
        alpha = settings.ema or 1.0
        value, state[0] = bounds.mine_loss(pos, neg, state[0], alpha)
        return value

    def _terms(
        self, x: Tensor, y: Tensor, theta: Tensor | None, repairings: int
    ) -> tuple[Tensor, Tensor]:
        """Return values (M,) of standardised events and their influence on them (M, N)."""
        settings, net, size = self.settings, self.net, x.shape[1]
        assert net is not None
        if settings.method == "ba":
            terms = net(x, y, theta)
            return terms.mean(1), terms
        if settings.method == "infonce":
            block = min(size, settings.batch_size)
            blocks = [
                all_pairs(net, x[:, a : a + block], y[:, a : a + block], theta)
                for a in range(0, size - block + 1, block)
            ]
            terms = torch.cat(
                [s.diagonal(dim1=1, dim2=2) - bounds.log_mean_exp(s) for s in blocks], 1
            )
            return terms.mean(1), terms
        pos = net(x, y, theta)
        count = min(repairings, size - 1)
        shifts = torch.linspace(1, size - 1, count).round().long().tolist()
        neg = torch.stack([net(x, y.roll(shift, 1), theta) for shift in shifts], 1)  # (M, K, N)
        if settings.method == "smile":
            neg = neg.clamp(-settings.tau, settings.tau)
        # event i takes part in the second term as x_i and as y_i; the roles are averaged (Hájek)
        norm = bounds.log_mean_exp(neg.flatten(1))
        as_x = torch.exp(neg - norm[:, None, None])
        as_y = torch.stack([as_x[:, i].roll(-s, 1) for i, s in enumerate(shifts)], 1)
        roles = as_x.mean(1) + as_y.mean(1) - 1
        if settings.method == "nwj":
            second = torch.exp(norm - 1)
            return pos.mean(1) - second, pos - second[:, None] * roles
        return pos.mean(1) - norm, pos - norm[:, None] - (roles - 1)

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return estimates (M,) in nats and standard errors (M,), float64, from events not trained on.

        The standard error is the infinitesimal jackknife over events.
        """
        x, y = self.prepare(x), self.prepare(y)
        settings = self.settings
        if not settings.trained:
            if settings.transform == "rank":
                x, y = (Frame(v, by_design=True, rank=True)(v) for v in (x, y))
            if settings.method == "ksg":
                terms = ksg_terms(x, y, settings.k, standardize=settings.standardize)
            else:
                terms = gaussian_terms(x.double(), y.double()).cpu()
            value = terms.mean(1)
        else:
            raw_x = x
            x, y = self.framed(x, y)
            theta = None if theta is None else self.prepare(theta)
            value, terms = self._terms(x, y, theta, settings.repairings)
            value, terms = value.double().cpu(), terms.double().cpu()
            if settings.method == "ba":
                value = value + self._entropy(raw_x) - float(self.log_volume())
        return value, terms.std(1) / math.sqrt(terms.shape[1])

    def _entropy(self, x: Tensor) -> float:
        """Return H(X): given, or estimated from the pooled events."""
        if self.settings.x_entropy is not None:
            return self.settings.x_entropy
        x = x.reshape(-1, x.shape[-1])
        if self.settings.classes:
            share = torch.bincount(x[:, 0].long()).double() / x.shape[0]
            return float(torch.special.entr(share).sum())
        rows = torch.unique(x, dim=0)  # common random numbers repeat x in every design
        return entropy_knn(rows, self.settings.k).item()

    def limit(self, events: int) -> float:
        """Return the value above which an estimate from so many events is saturated, in nats."""
        if self.settings.method in ("ba", "gaussian"):
            return math.inf
        if self.settings.method == "infonce":
            events = min(events, self.settings.batch_size)
        return math.log(events) - 1

    def change_theta(self, scale: Tensor, shift: Tensor) -> None:
        """Take θ' where θ = scale θ' + shift was taken, without a change of the function."""
        if isinstance(self.net, (JointCritic, PaperCritic, Decoder)):
            self.net.change_theta(scale, shift)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers and strings that `load_state_dict` takes."""
        state: dict[str, Any] = {"curve": self.curve}
        if self.net is not None and self.optimizer is not None:
            state["net"] = self.net.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
        if self.frame_x is not None:
            state["x"] = [self.frame_x.mean, self.frame_x.scale, self.frame_x.order]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the other estimator was."""
        self.curve = list(state["curve"])
        if self.net is not None and self.optimizer is not None:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
        if "x" in state:
            frame = Frame.__new__(Frame)
            frame.mean, frame.scale, frame.order = state["x"]
            self.frame_x = frame


def all_pairs(net: nn.Module, x: Tensor, y: Tensor, theta: Tensor | None) -> Tensor:
    """Return the scores (M, B, B) of every x with every y of its design.

    Example:
        >>> all_pairs(JointCritic(1, 1), torch.zeros(2, 5, 1), torch.zeros(2, 5, 1), None).shape
        torch.Size([2, 5, 5])
    """
    size = x.shape[1]
    left = x.repeat_interleave(size, 1)
    scores: Tensor = net(left, y.repeat(1, size, 1), theta)
    return scores.reshape(-1, size, size)
