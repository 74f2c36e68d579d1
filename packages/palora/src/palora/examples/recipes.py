"""The released configurations of the paper's experiments, runnable on data fetched or given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palora import data
from palora.examples.digits import classification_losses, classification_scores, composites
from palora.examples.models import LeNet, TaskMLP
from palora.examples.training import Task, TrainConfig

__all__ = ["RECIPES", "Recipe"]


@dataclass
class Recipe:
    """One experiment.

    Attributes:
        about: data, network and where the files come from.
        task: builds the problem from ``data_dir``.
        config: how it is trained.
        reference: reference point of the hypervolume.
    """

    about: str
    task: Callable[[str | Path | None], Task]
    config: TrainConfig
    reference: tuple[float, ...]


def _lenet(tasks: int) -> Callable[[int], nn.Module]:
    def build(extra: int) -> nn.Module:
        net = LeNet(tasks)
        if extra:
            net.encoder[0] = nn.Conv2d(1 + extra, 10, 5)
        return net

    return build


def _classify(
    train: tuple[Tensor, ...],
    test: tuple[Tensor, ...],
    build: Callable[[int], nn.Module],
    names: list[str],
) -> Task:
    return Task(train, test, build, classification_losses, classification_scores, names)


def _multimnist(digits: int) -> Callable[[str | Path | None], Task]:
    names = ["top-left", "bottom-right"] if digits == 2 else ["left", "middle", "right"]

    def task(folder: str | Path | None) -> Task:
        train = data.multimnist("train", folder, digits=digits)
        test = data.multimnist("t10k", folder, digits=digits)
        # the last 10,000 training composites are the validation part
        return _classify(tuple(t[:50_000] for t in train), test, _lenet(digits), names)

    return task


def mnist_composites(folder: str | Path | None, train: int = 12_000, test: int = 4_000) -> Task:
    """Two 28×28 digits on a 36×36 canvas, resized to 28×28, from MNIST's 10,000 test images.

    The first 8,000 images of a fixed permutation make the training composites, the other 2,000
    the test composites.
    """
    images, labels = data.mnist("t10k", folder)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    parts = []
    for rows, count, seed in ((order[:8000], train, 0), (order[8000:], test, 1)):
        canvas, a, b = composites(images[rows] / 255.0, labels[rows], count, 8, seed)
        small = F.interpolate(canvas.unsqueeze(1), (28, 28), mode="bilinear", antialias=True)
        parts.append((small, a, b))
    return _classify(parts[0], parts[1], _lenet(2), ["top-left", "bottom-right"])


def adult_task(folder: str | Path | None) -> Task:
    """UCI Adult: income above 50k, and never married; every fifth row is a test row."""
    if folder is None:
        raise FileNotFoundError("the Adult data are not downloaded: pass --data-dir")
    x, rich, single = data.adult(folder)
    held = torch.arange(len(x)) % 5 == 0

    def part(mask: Tensor) -> tuple[Tensor, ...]:
        return x[mask], rich[mask], single[mask]

    width = x.shape[1]
    return _classify(
        part(~held),
        part(held),
        lambda extra: TaskMLP(width + extra, [16], [2, 2]),
        ["income", "never married"],
    )


def _census(folder: str | Path | None) -> Task:
    parts = data.census(folder)
    width = parts["train"][0].shape[1]
    return _classify(
        parts["train"],
        parts["test"],
        lambda extra: TaskMLP(width + extra, [256], [2, 2]),
        ["age", "education"],
    )


def _sarcos(folder: str | Path | None) -> Task:
    parts = data.sarcos(folder)

    def losses(outputs: list[Tensor], *targets: Tensor) -> list[Tensor]:
        return [F.mse_loss(y[:, 0], t) for y, t in zip(outputs, targets, strict=True)]

    x, y = parts["train"]
    xt, yt = parts["test"]
    return Task(
        (x, *y.unbind(1)),
        (xt, *yt.unbind(1)),
        lambda extra: TaskMLP(21 + extra, [256, 256, 256], [1] * 7),
        losses,
        losses,
        [f"torque{i}" for i in range(7)],
    )


class _Faces(nn.Module):
    """ResNet-18 features with a head for age, gender and race."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.encoder = resnet18()
        self.encoder.fc = nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(512, out) for out in (1, 2, 5))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.encoder(x)
        return [head(features) for head in self.heads]


def face_losses(outputs: list[Tensor], age: Tensor, gender: Tensor, race: Tensor) -> list[Tensor]:
    """Huber loss (δ = 1) of the standardised age, cross-entropies of gender and race."""
    return [
        F.huber_loss(outputs[0][:, 0], age, delta=1.0),
        F.cross_entropy(outputs[1], gender),
        F.cross_entropy(outputs[2], race),
    ]


def _utkface(folder: str | Path | None) -> Task:
    if folder is None:
        raise FileNotFoundError("UTKFace is not downloaded: pass --data-dir")
    parts = data.utkface(folder)

    def build(extra: int) -> nn.Module:
        if extra:
            raise ValueError("COSMOS is not set up for UTKFace's ResNet-18")
        return _Faces()

    return Task(
        parts["train"], parts["test"], build, face_losses, face_losses, ["age", "gender", "race"]
    )


_RANDOM = TrainConfig(schedule="anneal-dirichlet", rays=1)

RECIPES: dict[str, Recipe] = {
    "multimnist": Recipe(
        "MultiMNIST, LeNet; downloads MNIST",
        _multimnist(2),
        TrainConfig(rank=1, rays=5),
        (1.0, 1.0),
    ),
    "multimnist3": Recipe(
        "MultiMNIST with three digits, LeNet; downloads MNIST",
        _multimnist(3),
        replace(_RANDOM, rank=1, epochs=20),
        (1.0, 1.0, 1.0),
    ),
    "mnist-composites": Recipe(
        "composites of MNIST's 10,000 test images, LeNet; folder mnist-test in the data folder",
        mnist_composites,
        TrainConfig(rank=4, rays=5),
        (1.0, 1.0),
    ),
    "adult": Recipe(
        "UCI Adult, two binary tasks; adult/*.csv in the data folder",
        adult_task,
        TrainConfig(rank=4, rays=5, epochs=5),
        (1.0, 1.0),
    ),
    "census": Recipe(
        "Census-Income KDD, age and education; downloads from UCI",
        _census,
        TrainConfig(rank=4, rays=5),
        (1.0, 1.0),
    ),
    "sarcos": Recipe(
        "SARCOS, seven torques; downloads two .mat files",
        _sarcos,
        replace(_RANDOM, lr=1e-4, batch=512, epochs=100, every=100),
        (1.0,) * 7,
    ),
    "utkface": Recipe(
        "UTKFace 64×64, ResNet-18; UTKFace/*.jpg in the data folder",
        _utkface,
        replace(_RANDOM, batch=128, epochs=100, every=100),
        (1.0, 1.0, 1.0),
    ),
}


def summary(recipe: Recipe, result: Any) -> dict[str, Any]:
    """The figures of one trained recipe."""
    front = result.fronts[-1]
    return {
        "parameters": result.parameters,
        "seconds": round(result.seconds[-1], 2),
        "hypervolume": front.hypervolume(recipe.reference),
        "nondominated": int(front.nondominated().sum()),
        "points": len(front),
        "spearman": front.spearman().tolist(),
        "losses": front.losses.tolist(),
        "prefs": front.prefs.tolist(),
    }
