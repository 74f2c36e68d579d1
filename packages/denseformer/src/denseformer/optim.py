"""Parameter groups: which weights decay, and how fast the averages learn."""

from __future__ import annotations

from typing import Any

from torch import nn

from denseformer.core.dwa import KeepsDtype
from denseformer.models.gains import GainedResidual


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    dwa_lr_mult: float = 1.0,
    decay_dwa: bool = False,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model for AdamW.

    Args:
        model: any model; tied parameters appear once.
        weight_decay: for parameters of two and more dimensions; norms, biases and gains get 0.
        lr: learning rate; needed for ``dwa_lr_mult`` other than 1.
        dwa_lr_mult: factor on the learning rate of the averages (paper: 1).
        decay_dwa: decay the averages too, as the published runs did. Over a whole schedule the learning
            rates sum to about 2 / weight_decay, so a weight without gradient shrinks by e^-2; default: not.

    Returns:
        Groups ``"decay"``, ``"no_decay"`` and ``"dwa"``, those that are not empty.

    Raises:
        ValueError: ``dwa_lr_mult`` without ``lr``.

    >>> from denseformer import DenseStack
    >>> groups = param_groups(DenseStack([nn.Linear(2, 2), nn.Linear(2, 2)]), 0.1)
    >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
    [('decay', 2, 0.1), ('no_decay', 2, 0.0), ('dwa', 1, 0.0)]
    """
    if dwa_lr_mult != 1 and lr is None:
        raise ValueError("dwa_lr_mult needs lr, the learning rate that it multiplies")
    averages = (
        m for m in model.modules() if isinstance(m, KeepsDtype)
    )  # of whole nets and of stages
    own = {id(p) for m in averages for p in m.parameters()}
    gains = {id(m.gain) for m in model.modules() if isinstance(m, GainedResidual)}
    split: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "dwa": []}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in own:
            split["dwa"].append(p)
        else:
            split["decay" if p.ndim >= 2 and id(p) not in gains else "no_decay"].append(p)
    decay = {"decay": weight_decay, "no_decay": 0.0, "dwa": weight_decay if decay_dwa else 0.0}
    groups: list[dict[str, Any]] = []
    for name, params in split.items():
        if params:
            groups.append({"name": name, "params": params, "weight_decay": decay[name]})
            if lr is not None:
                groups[-1]["lr"] = lr * (dwa_lr_mult if name == "dwa" else 1)
    return groups
