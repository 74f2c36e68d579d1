"""One training loop for all networks that see (x, y, θ): minibatches drawn on the device, early stopping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# maps (x, y, theta) of a minibatch to one loss for each design (M,)
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def make_adam(net: nn.Module, lr: float) -> torch.optim.Adam:
    """Return Adam, fused where all parameters allow it.

    Example:
        >>> make_adam(nn.Linear(1, 1), 0.1).defaults["fused"]
        True
    """
    return torch.optim.Adam(net.parameters(), lr, fused=True)


def train(
    net: nn.Module,
    loss: Loss,
    validate: Callable[[], Tensor],
    data: tuple[Tensor, Tensor, Tensor | None],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    optimizer: torch.optim.Adam | None = None,
    check_every: int = 50,
    patience: int = 10,
    clip: float | None = None,
) -> list[Tensor]:
    """Train `net` in place and leave the weights that were best on held-out events.

    Args:
        net: its parameters all have a leading dimension of groups, each with a best of its own.
        loss: of a minibatch, for each design.
        validate: returns the held-out value (groups,), higher is better; called every `check_every` steps.
        data: x (M, N, dx), y (M, N, dy), theta (M, F) or None.
        steps: at most this many minibatches; the learning rate falls linearly to a tenth.
        batch_size: events of each design in a minibatch, drawn without order and with replacement.
        lr: Adam's learning rate at the start.
        generator: draws the minibatches.
        optimizer: to go on with; a new one by default.
        check_every: steps between validations.
        patience: validations without an improvement in any group before stopping.
        clip: largest norm of the gradient, or None.

    Returns:
        The held-out values (groups,) at every check, from before the first step.

    Example:
        >>> from mi_surrogates.information.networks import BatchedMLP
        >>> net = BatchedMLP([1], [], 1)
        >>> x = torch.randn(1, 64, 1)
        >>> def loss(x, y, theta): return (net(x) - y).square().mean((1, 2))
        >>> def check(): return -loss(x, 3 * x, None)
        >>> curve = train(net, loss, check, (x, 3 * x, None), steps=400, batch_size=32, lr=0.05,
        ...               generator=torch.Generator())
        >>> curve[-1].item() > -1e-3
        True
    """
    x, y, theta = data
    params = list(net.parameters())
    optimizer = make_adam(net, lr) if optimizer is None else optimizer
    rows = torch.arange(x.shape[0], device=x.device)[:, None]

    with torch.no_grad():
        best = validate()
        kept = [param.detach().clone() for param in params]
    curve, waited = [best], 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - 0.9 * step / steps)
        chosen = torch.randint(x.shape[1], (x.shape[0], batch_size), generator=generator)
        chosen = chosen.to(x.device)
        value = loss(x[rows, chosen], y[rows, chosen], theta).sum()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        if (step + 1) % check_every == 0 or step + 1 == steps:
            with torch.no_grad():
                now = validate()
                better = now > best  # False for NaN
                best = torch.where(better, now, best)
                for old, param in zip(kept, params, strict=True):
                    mask = better.reshape(-1, *[1] * (param.dim() - 1))
                    old.copy_(torch.where(mask, param, old))
            curve.append(now)
            waited = 0 if bool(better.any()) else waited + 1
            if waited >= patience:
                break
    with torch.no_grad():
        for old, param in zip(kept, params, strict=True):
            param.copy_(old)
    return curve
