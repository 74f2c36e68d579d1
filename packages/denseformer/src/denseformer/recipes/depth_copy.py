"""The quick decisive task: an early representation must be reused late."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from denseformer.core.dwa import DWA


@dataclass(frozen=True)
class DepthCopy:
    """Mean squared errors: without averages, the least-squares optimum of the last row, and learned."""

    plain: float
    optimum: float
    learned: float
    first_weight: float  # of the embedding in the last row


def solve(depth: int = 16, width: int = 32, steps: int = 400, seed: int = 0) -> DepthCopy:
    """Learn one row of weights by L-BFGS where the optimum is known.

    The blocks are frozen, random and non-linear, ``x + tanh(W x)``; the target is X_0, read after the last
    block. With averages after the last block only ("Connect to Last") the error is quadratic in α, so that
    least squares gives its minimum.

    Args:
        depth, width: of the frozen stack.
        steps: of L-BFGS on the weights, full batch, float64.
        seed: of blocks and inputs.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layers = [normal(width, width) / width**0.5 for _ in range(depth)]
    x0 = normal(64, width)
    noise = 0.1 * normal(64, width)
    target = x0 + noise

    xs = [x0]
    for w in layers:
        xs.append(xs[-1] + torch.tanh(xs[-1] @ w))
    design = torch.stack([x.flatten() for x in xs], dim=1)
    best = torch.linalg.lstsq(design, target.flatten(), driver="gelsd").solution
    optimum = (design @ best - target.flatten()).square().mean()

    dwa = DWA(depth, pattern="final", dtype=torch.float64)
    optimizer = torch.optim.LBFGS(
        dwa.parameters(), max_iter=steps, history_size=depth + 1, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        run, x = dwa.begin(x0), x0
        for w in layers:
            x = run(x + torch.tanh(x @ w))
        loss = (x - target).square().mean()
        loss.backward()
        return loss

    plain = float(closure().detach())
    optimizer.step(closure)
    return DepthCopy(
        plain, float(optimum), float(closure().detach()), float(dwa.row(depth)[0].detach())
    )
