"""What a classifier's input gradients are worth, in numbers: the paper's evaluations and a few exact ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradient_alignment.core.noise import check_count
from gradient_alignment.core.targets import class_logit
from gradient_alignment.core.trace import hessian_trace
from gradient_alignment.generate.density import alignment, density_ratio
from gradient_alignment.generate.sampling import gan_test
from gradient_alignment.interpret.fooling import ShiftedLogits
from gradient_alignment.interpret.perturb import Curve, pixel_perturbation
from gradient_alignment.interpret.saliency import input_gradient, reduce_channels
from gradient_alignment.recipes.data import Split
from gradient_alignment.recipes.models import accuracy

EXACT_UP_TO = 256
"""Inputs of at most this many values have their trace computed exactly, larger ones by 10 Hutchinson draws."""


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        accuracy: on the test data, in [0, 1].
        trace: mean of tr ∇²f_y.
        gradient: mean of ‖∇f_y‖².
        gan_test: share of samples that the judge recognises, in [0, 1].
        distance: mean Euclidean distance of a sample to the nearest training image.
        alignment: mean cosine of ∇f_y with the direction to the mean of the class.
        density: mean log-density ratio of noisy to clean images, by the noise's standard deviation.
        lerf: accuracy as the least salient pixels go, by the model's own gradients.
        morf: the same, the most salient first.
        samples: (N, C, H, W).
        labels: (N,) the classes that they were made for.
    """

    accuracy: float
    trace: float
    gradient: float
    gan_test: float
    distance: float
    alignment: float
    density: dict[float, float]
    lerf: Curve
    morf: Curve
    samples: Tensor
    labels: Tensor

    def summary(self) -> dict[str, Any]:
        """Return the numbers, ready for JSON."""
        names = ("accuracy", "trace", "gradient", "gan_test", "distance", "alignment")
        numbers: dict[str, Any] = {name: getattr(self, name) for name in names}
        numbers["density"] = {str(scale): value for scale, value in self.density.items()}
        return {**numbers, "lerf_auc": self.lerf.auc, "morf_auc": self.morf.auc}


def svm_judge(data: Split) -> Callable[[Tensor], Tensor]:
    """Return a judge of another kind than the networks: an RBF support vector machine on raw pixels.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            'the judge comes with scikit-learn: pip install "gradient-alignment[data]"'
        ) from error
    machine = SVC(C=10.0).fit(data.train_x.flatten(1).numpy(), data.train_y.numpy())

    def judge(x: Tensor) -> Tensor:
        return torch.as_tensor(machine.predict(x.flatten(1).numpy()))

    return judge


def nearest_distance(samples: Tensor, data: Tensor) -> Tensor:
    """Return the Euclidean distance of every sample to the nearest of the data, (N,)."""
    return torch.cdist(samples.flatten(1), data.flatten(1)).amin(1)


def mean_trace(
    model: nn.Module, x: Tensor, y: Tensor, *, num_samples: int = 10, seed: int = 0
) -> float:
    """Return the mean of tr ∇²f_y over a batch, exactly for small inputs (see `EXACT_UP_TO`)."""
    exact = x[0].numel() <= EXACT_UP_TO
    traces = hessian_trace(
        class_logit(model, y),
        x,
        method="exact" if exact else "hutchinson",
        num_samples=num_samples,
        generator=torch.Generator(x.device).manual_seed(seed),
        create_graph=False,
    )
    return float(traces.mean())


def evaluate(
    model: nn.Module,
    data: Split,
    judge: Callable[[Tensor], Any],
    *,
    num_samples: int = 200,
    steps: int = 500,
    num_images: int = 200,
    scales: tuple[float, ...] = (0.1, 0.3),
    seed: int = 0,
) -> Evaluation:
    """Evaluate a classifier in evaluation mode as the paper does; seeded.

    Args:
        model: classifier.
        data: see `recipes.data.load`.
        judge: an independent classifier, see `gan_test`.
        num_samples: images to sample, of the classes in turn.
        steps: of the sampler.
        num_images: test images for gradients, traces and perturbation, taken at even distances.
        scales: standard deviations of the noise for density ratios.
        seed: of all draws.
    """
    check_count("num_images", num_images)
    model = model.eval()
    rows = torch.linspace(0, len(data.test_x) - 1, min(num_images, len(data.test_x))).long()
    x, y = data.test_x[rows], data.test_y[rows]
    generator = torch.Generator(x.device).manual_seed(seed)
    labels = torch.arange(num_samples, device=x.device) % data.num_classes
    test = gan_test(
        model,
        judge,
        labels=labels,
        num_classes=data.num_classes,
        steps=steps,
        shape=tuple(x.shape[1:]),
        generator=generator,
    )
    slope = input_gradient(model, x, y)
    saliency = reduce_channels(slope)
    ratios = density_ratio(model, [(x, y)], scales, num_noise=4, generator=generator)
    aligned = alignment(model, x, y, data=(data.train_x, data.train_y))
    return Evaluation(
        accuracy=accuracy(model, data.test_x, data.test_y),
        trace=mean_trace(model, x[:128], y[:128], seed=seed),
        gradient=float(slope.flatten(1).square().sum(1).mean()),
        gan_test=test.accuracy,
        distance=float(nearest_distance(test.samples, data.train_x).mean()),
        alignment=float(aligned.mean()),
        density=dict(zip(scales, ratios.tolist(), strict=True)),
        lerf=pixel_perturbation(model, x, y, saliency),
        morf=pixel_perturbation(model, x, y, saliency, order="morf"),
        samples=test.samples,
        labels=labels,
    )


def drawn_pattern(shape: tuple[int, ...]) -> Tensor:
    """Return a pattern to hide in saliency maps, a ring with a cross, (C, H, W) of norm 1."""
    channels, height, width = shape
    rows = torch.linspace(-1, 1, height).view(-1, 1)
    columns = torch.linspace(-1, 1, width).view(1, -1)
    radius = (rows.square() + columns.square()).sqrt()
    ring = (radius - 0.85).abs() < 0.2
    cross = ((rows.abs() < 0.15) | (columns.abs() < 0.15)) & (radius < 0.6)
    picture = (ring | cross).float().expand(channels, height, width)
    scaled: Tensor = picture / torch.linalg.vector_norm(picture)
    return scaled


@dataclass(frozen=True)
class Fooled:
    """Result of `compare_fooled`: what the deception changed.

    Attributes:
        accuracy: before and after.
        shown: smallest cosine of a logit gradient with the pattern, after.
        own: mean of the same, before.
        loss_gradients: largest change of a loss gradient, relative to their root mean square.
    """

    accuracy: tuple[float, float]
    shown: float
    own: float
    loss_gradients: float


def compare_fooled(
    model: nn.Module, fooled: ShiftedLogits, pattern: Tensor, x: Tensor, y: Tensor
) -> Fooled:
    """Return what a deception changed; give models and data in float64 to see rounding small."""

    def cosines(each: nn.Module) -> Tensor:
        maps = input_gradient(each, x, y).flatten(1)
        return F.normalize(maps, dim=1) @ F.normalize(pattern.flatten(), dim=0)

    before, after = (input_gradient(each, x, y, of="loss").flatten(1) for each in (model, fooled))
    size = before.norm(dim=1).square().mean().sqrt()
    return Fooled(
        accuracy=(accuracy(model, x, y), accuracy(fooled, x, y)),
        shown=float(cosines(fooled).min()),
        own=float(cosines(model).mean()),
        loss_gradients=float(((after - before).norm(dim=1) / size).max()),
    )
