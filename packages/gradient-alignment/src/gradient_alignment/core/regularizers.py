"""Regularisers of a classifier's input gradients: score matching, its opposite, and the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradient_alignment.core.modes import BatchNormMode
from gradient_alignment.core.noise import (
    Distribution,
    check_choice,
    check_count,
    check_positive,
    directions,
)
from gradient_alignment.core.objectives import Objective, half_square, score_matching_loss
from gradient_alignment.core.shared import SharedPass, refuse_compiled, warn_if_piecewise_linear
from gradient_alignment.core.targets import Target, check_target
from gradient_alignment.core.trace import (
    FINITE_DIFFERENCES,
    TRANSFORMS,
    Method,
    hessian_trace,
    second_difference,
)


class Regularizer(nn.Module):
    """A term that is added to a classifier's loss.

    Attributes:
        terms: the parts of the last value, detached scalars by name.
    """

    bn: BatchNormMode = "shared"

    def __init__(self, weight: float) -> None:
        super().__init__()
        if not math.isfinite(weight):
            raise ValueError(f"weight must be finite, got {weight!r}")
        self.weight = weight
        self.terms: dict[str, Tensor] = {}

    def forward(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Return the term, 0-dimensional.

        Args:
            model: maps (B, ...) to logits (B, C).
            x: (B, ...); it need not require a gradient, and its `.grad` is left alone.
            y: (B,) class indices.
            logits: of x, if they were computed from an x that requires a gradient; saves a pass.

        Raises:
            ValueError: labels or logits that do not fit; logits of a pass with dropout, where an estimator compares
                them with its own passes.
        """
        return self.evaluate(SharedPass(model, x, y, bn=self.bn, logits=logits))

    def evaluate(self, shared: SharedPass) -> Tensor:
        """Return the term from a pass that is shared with others."""
        raise AssertionError("a regulariser defines its value")  # pragma: no cover

    def _note(self, **terms: Tensor) -> None:
        self.terms = {name: value.detach() for name, value in terms.items()}


class _Traced(Regularizer):
    """What the two regularisers of the Hessian's trace have in common: how it is estimated."""

    def __init__(
        self,
        weight: float,
        estimator: Method,
        sigma: float,
        num_samples: int,
        of: Target,
        bn: BatchNormMode,
        distribution: Distribution | None,
        generator: torch.Generator | None,
        chunk: int | None,
        allow_low_precision: bool,
    ) -> None:
        super().__init__(weight)
        check_choice("estimator", estimator, Method)
        check_choice("bn", bn, BatchNormMode)
        if distribution is not None:
            check_choice("distribution", distribution, Distribution)
        check_positive("sigma", sigma)
        check_count("num_samples", num_samples)
        check_target(of)
        self.estimator, self.sigma, self.num_samples, self.of = estimator, sigma, num_samples, of
        self.bn, self.distribution, self.generator, self.chunk = bn, distribution, generator, chunk
        self.allow_low_precision = allow_low_precision

    def _chunk(self, shared: SharedPass) -> int | None:
        return self.chunk if shared.batched_draws else 1

    def trace(self, shared: SharedPass) -> Tensor:
        """Return the estimated trace of every sample, (B,)."""
        warn_if_piecewise_linear(shared.model)
        if self.estimator not in ("taylor", "taylor-cv"):
            if self.estimator not in FINITE_DIFFERENCES:
                refuse_compiled(shared.model)
            if self.estimator in TRANSFORMS and shared.moves_statistics:
                raise RuntimeError(
                    f"estimator {self.estimator!r} is made by torch.func, under which batch normalisation cannot "
                    "update its running statistics: use bn='shared' or bn='frozen'"
                )
            estimate: Tensor = hessian_trace(
                shared.function(self.of),
                shared.x,
                method=self.estimator,
                num_samples=self.num_samples,
                sigma=self.sigma,
                distribution=self.distribution,
                generator=self.generator,
                chunk=self._chunk(shared),
                allow_low_precision=self.allow_low_precision,
            )
            return estimate
        if shared.foreign_masks:
            raise ValueError(
                "logits of a pass that was not ours have other dropout masks than the noisy pass: leave them out"
            )
        controlled = self.estimator == "taylor-cv"
        default: Distribution = "rademacher" if controlled else "gaussian"
        point = shared.x.detach()
        kind = self.distribution or default
        noise = directions(point, self.num_samples, kind, self.generator)
        draws = second_difference(
            shared.function(self.of),
            point,
            noise,
            self.sigma,
            value=shared.value(self.of),
            slope=shared.gradient(self.of) if controlled else None,
            chunk=self._chunk(shared),
            allow_low_precision=self.allow_low_precision,
        )
        return draws.mean(0)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state of the generator, so that a resumed run draws the same directions."""
        state = None if self.generator is None else self.generator.get_state()
        return {"generator": state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_extra_state` returned."""
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        """Write the generator as its state; generators themselves cannot be copied."""
        state = dict(self.__dict__)
        generator = state.pop("generator")
        state["_generator"] = generator and (str(generator.device), generator.get_state())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the generator again."""
        saved = state.pop("_generator")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.generator = None
        if saved is not None:
            self.generator = torch.Generator(saved[0])
            self.generator.set_state(saved[1])


class ScoreMatching(_Traced):
    r"""Score matching of the class-conditional density that a classifier implies (Eq. 4).

    .. math:: \lambda\,\big(\bar h + \tfrac12\overline{\|\nabla_x f_y\|^2} + \mu\,\overline{h^2}\big),
        \qquad h \approx \mathrm{tr}\,\nabla_x^2 f_y

    with means over the batch. The term in :math:`\mu` keeps the trace from falling without bound.

    With the published estimator ("taylor", σ = 0.01) E h² contains 4‖∇f‖²/σ², so that the stability term is mostly
    a second penalty of the gradient's norm, of weight 4μ/σ² = 40 against ½. The default "taylor-cv" removes
    that part; weights do not carry over from one to the other.

    Args:
        weight: λ, default 1e-3, the paper's.
        stability: μ, default 1e-3, the paper's.
        estimator: of the trace, see `hessian_trace`; default "taylor-cv".
        sigma: finite step, in units of x; default 0.01, the authors' code.
        num_samples: draws for each sample.
        objective: "esm" as above, or another of `score_matching_loss`; "fd-ssm" and "dsm" have no separate
            trace and need `stability=0`.
        of: whose score, see `pick`; default the label's logit.
        bn: batch normalisation in training, see `modes`: "shared", "frozen" or "batch".
        distribution: of the directions; None is "gaussian" for "taylor", else "rademacher".
        generator: source of the directions; its state is in the state dict.
        chunk: draws in one pass.
        curvature: weight of the curvature penalty, of objective "ksm".
        variance_reduction: of objective "dsm", see `score_matching_loss`.
        allow_low_precision: see `hessian_trace`.

    Raises:
        ValueError: an unknown word, a number out of range, a stability term where there is no trace,
            `variance_reduction` for another objective than "dsm".
        RuntimeError: when called, for a compiled model with an estimator that needs its double backward, and
            for forward-mode estimators with bn="batch" and batch normalisation in training.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(10), torch.nn.Linear(8, 3))
        >>> regularizer = ScoreMatching(weight=1e-2)
        >>> value = regularizer(net, torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> value.shape, sorted(regularizer.terms)
        (torch.Size([]), ['gradient', 'nonfinite', 'stability', 'trace'])
    """

    def __init__(
        self,
        weight: float = 1e-3,
        stability: float = 1e-3,
        estimator: Method = "taylor-cv",
        sigma: float = 0.01,
        num_samples: int = 1,
        objective: Objective = "esm",
        of: Target = "label",
        bn: BatchNormMode = "shared",
        distribution: Distribution | None = None,
        generator: torch.Generator | None = None,
        *,
        chunk: int | None = None,
        curvature: float = 1e-3,
        variance_reduction: bool = False,
        allow_low_precision: bool = False,
    ) -> None:
        super().__init__(
            weight,
            estimator,
            sigma,
            num_samples,
            of,
            bn,
            distribution,
            generator,
            chunk,
            allow_low_precision,
        )
        check_choice("objective", objective, Objective)
        if not math.isfinite(curvature):
            raise ValueError(f"curvature must be finite, got {curvature!r}")
        if variance_reduction and objective != "dsm":
            raise ValueError(f"variance_reduction is for objective 'dsm', got {objective!r}")
        if not math.isfinite(stability):
            raise ValueError(f"stability must be finite, got {stability!r}")
        if stability and objective != "esm":
            raise ValueError(
                f"objective {objective!r} has no separate estimate of the trace: pass stability=0"
            )
        self.stability, self.objective = stability, objective
        self.curvature, self.variance_reduction = curvature, variance_reduction

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ScoreMatching:
        """Return the published settings: the plain estimator, batch statistics of each pass.

        Args:
            name: "paper" (λ = μ = 1e-3) or "code" (λ = 1e-5, μ = 1e-3); σ = 0.01 and one draw in both.
            **changes: arguments that replace the preset's.

        Raises:
            ValueError: an unknown name.
        """
        return cls(**{**_published(name, {"paper": 1e-3, "code": 1e-5}), "sigma": 0.01, **changes})

    def evaluate(self, shared: SharedPass) -> Tensor:
        """Return λ (mean h + ½ mean ‖∇f‖² + μ mean h²), or λ times the mean of another objective."""
        if self.objective != "esm":
            refuse = self.objective != "fd-ssm"
            if refuse:
                refuse_compiled(shared.model)
            values = score_matching_loss(
                shared.function(self.of),
                shared.x,
                self.objective,
                num_samples=self.num_samples,
                sigma=self.sigma,
                distribution=self.distribution,
                generator=self.generator,
                chunk=self._chunk(shared),
                curvature=self.curvature,
                variance_reduction=self.variance_reduction,
                allow_low_precision=self.allow_low_precision,
            )
            self._note(objective=values.mean(), nonfinite=(~values.isfinite()).sum())
            return self.weight * values.mean()
        # the gradient first: backward then finds its graph beside the clean pass's, in the cache
        size = half_square(shared.gradient(self.of)).mean()
        h = self.trace(shared)
        square = h.square().mean()
        self._note(trace=h.mean(), gradient=size, stability=square, nonfinite=(~h.isfinite()).sum())
        return self.weight * (h.mean() + size + self.stability * square)


class AntiScoreMatching(_Traced):
    r"""The opposite: raises the trace up to a threshold, :math:`-\lambda\,\overline{\min(h, \tau)}`.

    Samples above the threshold have no gradient; the mean is over all samples.

    Args:
        weight: λ, default 1e-4, the paper's.
        threshold: τ, default 1000, the paper's.
        estimator: see `ScoreMatching`. The published one at the published σ = 0.001 is noise: it fails to raise
            the trace.
        sigma: see `ScoreMatching`.
        num_samples: see `ScoreMatching`.
        of: see `ScoreMatching`.
        bn: see `ScoreMatching`.
        distribution: see `ScoreMatching`.
        generator: see `ScoreMatching`.
        chunk: see `ScoreMatching`.
        allow_low_precision: see `ScoreMatching`.

    Raises:
        ValueError: a threshold that is not finite, and what `ScoreMatching` raises.
    """

    def __init__(
        self,
        weight: float = 1e-4,
        threshold: float = 1e3,
        estimator: Method = "taylor-cv",
        sigma: float = 0.01,
        num_samples: int = 1,
        of: Target = "label",
        bn: BatchNormMode = "shared",
        distribution: Distribution | None = None,
        generator: torch.Generator | None = None,
        *,
        chunk: int | None = None,
        allow_low_precision: bool = False,
    ) -> None:
        super().__init__(
            weight,
            estimator,
            sigma,
            num_samples,
            of,
            bn,
            distribution,
            generator,
            chunk,
            allow_low_precision,
        )
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold!r}")
        self.threshold = threshold

    @classmethod
    def preset(cls, name: str, **changes: Any) -> AntiScoreMatching:
        """Return the published settings: "paper" (λ = 1e-4, τ = 1000) or "code" (λ = 1e-5, τ = 1e4); σ = 0.001.

        Raises:
            ValueError: an unknown name.
        """
        published = _published(name, {"paper": 1e-4, "code": 1e-5})
        threshold = 1e3 if name == "paper" else 1e4
        return cls(**{**published, "sigma": 0.001, "threshold": threshold, **changes})

    def evaluate(self, shared: SharedPass) -> Tensor:
        """Return -λ mean min(h, τ)."""
        h = self.trace(shared)
        capped = h.clamp(max=self.threshold).mean()
        self._note(
            trace=h.mean(),
            capped=capped,
            above=(h > self.threshold).sum(),
            nonfinite=(~h.isfinite()).sum(),
        )
        return -self.weight * capped


class GradientNorm(Regularizer):
    r"""The size of the input gradient, :math:`\lambda\,\frac1p\overline{\|\nabla_x f_y\|_p^p}`.

    Args:
        weight: λ, default 1e-3, the paper's, with p = 2.
        of: "label" (the paper), "loss" (double backpropagation), or another of `pick`.
        p: 1 or 2.
        bn: see `ScoreMatching`.

    Raises:
        ValueError: an unknown word, or another p.
    """

    def __init__(
        self,
        weight: float = 1e-3,
        of: Target = "label",
        p: int = 2,
        bn: BatchNormMode = "shared",
    ) -> None:
        super().__init__(weight)
        check_target(of)
        check_choice("bn", bn, BatchNormMode)
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p!r}")
        self.of, self.p, self.bn = of, p, bn

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GradientNorm:
        """Return the published settings: "paper" (λ = 1e-3) or "code" (λ = 1e-5).

        Raises:
            ValueError: an unknown name.
        """
        published = _published(name, {"paper": 1e-3, "code": 1e-5})
        return cls(**{"weight": published["weight"], "bn": "batch", **changes})

    def evaluate(self, shared: SharedPass) -> Tensor:
        """Return λ/p times the mean of ‖∇f‖_p^p."""
        slope = shared.gradient(self.of).flatten(1)
        size = (0.5 * slope.square() if self.p == 2 else slope.abs()).sum(1)
        self._note(gradient=size.mean(), nonfinite=(~size.isfinite()).sum())
        return self.weight * size.mean()


def _published(name: str, weights: dict[str, float]) -> dict[str, Any]:
    if name not in weights:
        raise ValueError(f"preset must be 'paper' or 'code', got {name!r}")
    return {"weight": weights[name], "estimator": "taylor", "bn": "batch"}
