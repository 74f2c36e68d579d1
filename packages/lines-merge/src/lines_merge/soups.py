"""Compositions that the paper reports: WiSE-FT, uniform and greedy soups, rewarded soups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .lines import edit, merge
from .schedule import check_finite
from .sources import Source, label_models


def check_fraction(**value: float) -> float:
    """Return the one value given, or raise ValueError if it is outside [0, 1]."""
    check_finite(**value)
    ((name, number),) = value.items()
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {number}")
    return float(number)


def wise_ft(
    base: Source,
    finetuned: Source,
    gamma: float,
    alpha: float = 0.5,
    beta: float = 0.5,
    **arguments: Any,
) -> dict[str, Tensor]:
    r"""Return :math:`\theta_0 + \gamma\,\mathrm{LiNeS}(\tau; \alpha, \beta)`.

    Args:
        base: pre-trained weights.
        finetuned: fine-tuned weights.
        gamma: interpolation coefficient in [0, 1], swept to trade one accuracy for another.
        alpha: factor of the first block; alpha = 1, beta = 0 is WiSE-FT itself.
        beta: increase to the last block.
        **arguments: see `edit`.

    Raises:
        ValueError: gamma outside [0, 1].
    """
    check_fraction(gamma=gamma)
    check_finite(alpha=alpha, beta=beta)
    return edit(base, finetuned, alpha=gamma * alpha, beta=gamma * beta, **arguments)


def uniform_soup(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    **arguments: Any,
) -> dict[str, Tensor]:
    r"""Return :math:`\theta_0 + \mathrm{LiNeS}(\frac1T \sum_t \tau_t; \alpha, \beta)`.

    Args:
        base: pre-trained weights.
        models: models that were fine-tuned on the same task.
        alpha: factor of the first block; the defaults give the plain average of the models.
        beta: increase to the last block.
        **arguments: see `merge`.
    """
    return merge(base, models, "average", alpha=alpha, beta=beta, **arguments)


class GreedySoup(NamedTuple):
    """Result of `greedy_soup`: weights, the keys of the models in it, its validation score."""

    weights: dict[str, Tensor]
    members: list[str]
    score: float


def greedy_soup(
    base: Source,
    models: Sequence[Source] | Mapping[str, Source],
    evaluate: Callable[[dict[str, Tensor]], float],
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    **arguments: Any,
) -> GreedySoup:
    """Average the models that help: best first, each added if the soup's accuracy does not drop.

    Args:
        base: pre-trained weights.
        models: models that were fine-tuned on the same task.
        evaluate: returns the validation accuracy of a state dict.
        alpha: factor of the first block, applied to the finished soup.
        beta: increase to the last block, applied to the finished soup.
        **arguments: see `merge`.
    """
    keys, sources = label_models(models)
    table = dict(zip(keys, sources, strict=True))

    def soup(members: Sequence[str], alpha: float = 1.0, beta: float = 0.0) -> dict[str, Tensor]:
        chosen = {key: table[key] for key in members}
        return uniform_soup(base, chosen, alpha=alpha, beta=beta, **arguments)

    scores = {key: evaluate(soup([key])) for key in keys}
    order = sorted(keys, key=lambda key: -scores[key])
    members, best = [order[0]], scores[order[0]]
    for key in order[1:]:
        score = evaluate(soup([*members, key]))
        if score >= best:
            members, best = [*members, key], score
    weights = soup(members, alpha, beta)
    if (alpha, beta) != (1.0, 0.0):
        best = evaluate(weights)
    return GreedySoup(weights, members, best)


def rewarded_soup(
    base: Source,
    first: Source,
    second: Source,
    lam: float,
    alpha: float = 1.0,
    beta: float = 1.0,
    **arguments: Any,
) -> dict[str, Tensor]:
    r"""Return :math:`\theta_{SFT} + \mathrm{LiNeS}(\lambda\tau_1 + (1 - \lambda)\tau_2; \alpha, \beta)`.

    Args:
        base: the supervised model that both policies start from.
        first: policy of the first reward.
        second: policy of the second reward.
        lam: preference in [0, 1] for the first reward.
        alpha: factor of the first block; the paper's 1 and 1 scale by 1 to 2, untuned.
        beta: increase to the last block.
        **arguments: see `merge`.

    Raises:
        ValueError: lam outside [0, 1].
    """
    check_fraction(lam=lam)
    weights = [float(lam), 1.0 - float(lam)]
    return merge(base, [first, second], weights=weights, alpha=alpha, beta=beta, **arguments)
