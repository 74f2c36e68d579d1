"""Split-digits: fine-tuning on two digits forgets the other eight; LiNeS brings them back.

The paper's forgetting experiment (Section 4) in kind, in seconds on a CPU. A residual MLP of eight blocks
learns scikit-learn's ten digits; each fine-tuned copy then sees one pair of digits only. *Target* is the
ten-way accuracy on the digits of that pair, *control* the one on the other eight. The classifier is a
frozen random head, as the paper's CLIP text head is frozen, so an edit touches features alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lines_merge as lm

PAIRS: tuple[tuple[int, int], ...] = ((0, 6), (1, 8), (2, 3), (4, 9), (5, 7))
GRID: tuple[float, ...] = tuple(i / 10 for i in range(11))
StateDict = dict[str, Tensor]


class Block(nn.Module):
    """Pre-norm residual block, `x + W2 gelu(W1 LN(x))`, starting close to the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        nn.init.normal_(self.fc2.weight, std=0.02)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, width) to (batch, width)."""
        update: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return x + update


class ResidualMLP(nn.Module):
    """Stem, `depth` blocks, final norm; logits are 10 times the cosine to a frozen random head."""

    head: Tensor

    def __init__(self, width: int = 64, depth: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("head", F.normalize(torch.randn(classes, width), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (batch, 64) to logits (batch, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return 10 * F.normalize(self.norm(x), dim=1) @ self.head.T


with torch.device("meta"):
    _ARCHITECTURE = ResidualMLP()  # evaluated with the weights of others, so it holds none


@dataclass(frozen=True)
class Digits:
    """Disjoint parts of the 1,797 digits; each part is a pair (pixels in [0, 1], labels)."""

    base: tuple[Tensor, Tensor]
    finetune: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits(seed: int) -> Digits:
    """Load scikit-learn's digits, shuffled by `seed`: 400 base, 600 fine-tune, 200 validation, 597 test.

    Raises:
        ImportError: scikit-learn is missing (`pip install "lines-merge[data]"`).
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            'the digits come with scikit-learn: pip install "lines-merge[data]"'
        ) from error
    data, target = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    x = torch.as_tensor(data, dtype=torch.float32)[order] / 16
    y = torch.as_tensor(target, dtype=torch.int64)[order]
    sizes = [400, 600, 200, len(y) - 1200]
    parts = list(zip(torch.split(x, sizes), torch.split(y, sizes), strict=True))
    return Digits(*parts)


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], *, steps: int, lr: float, seed: int
) -> StateDict:
    """Train with AdamW (batch 64, cosine decay, gradient norm clipped at 1); return the weights.

    Args:
        model: network that is trained in place.
        data: pixels (n, 64) and labels (n,).
        steps: number of optimiser steps.
        lr: learning rate at the first step.
        seed: of the order of the batches, drawn with replacement.
    """
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(y), (64,), generator=generator)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def subset(data: tuple[Tensor, Tensor], digits: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Keep the rows whose label is among `digits`."""
    keep = torch.isin(data[1], torch.tensor(list(digits)))
    return data[0][keep], data[1][keep]


@torch.no_grad()
def accuracy(weights: StateDict, data: tuple[Tensor, Tensor]) -> float:
    """Return the ten-way accuracy, in percent, of the network with these weights."""
    logits = torch.func.functional_call(_ARCHITECTURE, weights, (data[0],))
    hits = (logits.argmax(1) == data[1]).sum()
    return 100 * int(hits) / len(data[1])


@dataclass(frozen=True)
class Experiment:
    """A base network and its five fine-tuned copies, one for each of `PAIRS`."""

    digits: Digits
    base: StateDict
    finetuned: tuple[StateDict, ...]


def prepare(
    seed: int,
    *,
    lr: float = 5e-4,
    shift: Callable[[Tensor, int], Tensor] | None = None,
) -> Experiment:
    """Train the base network (150 steps, 1e-3) and the five copies (60 steps each).

    Args:
        seed: of the split, the initialisation and the batches.
        lr: learning rate of the fine-tuning; 2e-3 is the aggressive setting.
        shift: maps (pixels, task) to the pixels that the fine-tuning of this task sees instead; with a
            shift the tasks differ at the input and keep all ten digits.
    """
    digits = load_digits(seed)
    torch.manual_seed(seed)
    base = train(ResidualMLP(), digits.base, steps=150, lr=1e-3, seed=seed)
    copies = []
    for task, pair in enumerate(PAIRS):
        model = ResidualMLP()
        model.load_state_dict(base)
        x, y = digits.finetune if shift else subset(digits.finetune, pair)
        data = (shift(x, task), y) if shift else (x, y)
        copies.append(train(model, data, steps=60, lr=lr, seed=seed))
    return Experiment(digits, base, tuple(copies))


def target_control(experiment: Experiment, edited: Sequence[StateDict]) -> tuple[float, float]:
    """Return (target, control) test accuracy in percent, means over the five edited networks."""
    targets, controls = [], []
    for pair, weights in zip(PAIRS, edited, strict=True):
        others = set(range(10)) - set(pair)
        targets.append(accuracy(weights, subset(experiment.digits.test, pair)))
        controls.append(accuracy(weights, subset(experiment.digits.test, others)))
    return sum(targets) / len(targets), sum(controls) / len(controls)


def trade_off(
    experiment: Experiment, schedule: str, grid: Sequence[float] = GRID
) -> list[tuple[float, float]]:
    """Return (target, control) for each value of the grid.

    Args:
        experiment: what `prepare` returned.
        schedule: "linear" (LiNeS) and "reverse" read the grid as gamma, "uniform" as one factor of the
            whole update.
        grid: values in [0, 1]; 1 is the fine-tuned network itself.
    """

    def edited(finetuned: StateDict, value: float) -> StateDict:
        if schedule == "uniform":
            return dict(lm.edit(experiment.base, finetuned, alpha=value, beta=0.0))
        return dict(lm.edit(experiment.base, finetuned, value, schedule=schedule))

    return [
        target_control(experiment, [edited(weights, value) for weights in experiment.finetuned])
        for value in grid
    ]


def merged_accuracy(experiment: Experiment, *, lines: bool) -> tuple[float, float]:
    """Merge the five copies by task arithmetic; return (chosen coefficient, test accuracy).

    The coefficient (beta with LiNeS, the constant factor without) is chosen on the validation rows from
    {0.1, ..., 1.0}, as in the paper; the smallest wins a tie.
    """
    best = (-1.0, 0.0, experiment.base)
    for value in GRID[1:]:
        models = list(experiment.finetuned)
        if lines:
            merged = lm.merge(experiment.base, models, beta=value)
        else:
            merged = lm.merge(experiment.base, models, alpha=value, beta=0.0)
        score = accuracy(merged, experiment.digits.validation)
        if score > best[0]:
            best = (score, value, merged)
    return best[1], accuracy(best[2], experiment.digits.test)
