from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradient_alignment as ga
from gradient_alignment.interpret.perturb import default_fractions


def make(
    seed: int = 0, channels: int = 2
) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 36, 3)).double()
    x = torch.rand(7, channels, 6, 6, dtype=torch.float64)
    return model, x, torch.arange(7) % 3, torch.randn(7, 6, 6, dtype=torch.float64)


def brute_force(model, x, y, saliency, fraction, order, fill, metric):
    """One image and one pixel at a time."""
    values = []
    for image, label, scores in zip(x, y, saliency, strict=True):
        flat = scores.flatten().tolist()
        sign = -1 if order == "morf" else 1
        ranking = sorted(range(len(flat)), key=lambda i: (sign * flat[i], i))
        count = max(1, round(fraction * len(flat)))
        changed = image.clone()
        for pixel in ranking[:count]:
            row, column = divmod(pixel, image.shape[-1])
            for channel in range(len(image)):
                if fill == "mean":
                    changed[channel, row, column] = image[channel].mean()
                elif fill == "blur":
                    around = [
                        image[channel, min(max(r, 0), 5), min(max(c, 0), 5)]
                        for r in range(row - 2, row + 3)
                        for c in range(column - 2, column + 3)
                    ]
                    changed[channel, row, column] = sum(around) / 25
                elif isinstance(fill, torch.Tensor):
                    changed[channel, row, column] = fill.expand_as(image)[channel, row, column]
                else:
                    changed[channel, row, column] = fill
        logits = model(changed[None])[0].detach()
        if metric == "accuracy":
            values.append(float(logits.argmax() == label))
        elif metric == "prob":
            values.append(float(logits.softmax(0)[label]))
        else:
            values.append(float(logits[label]))
    return float(np.mean(values))


FRACTIONS = [0.1, 0.33, 0.75, 1.0]
DATASET_MEAN = torch.tensor([0.2, 0.7], dtype=torch.float64).view(2, 1, 1)


@pytest.mark.parametrize("order", ["lerf", "morf"])
@pytest.mark.parametrize(
    "fill", ["mean", "blur", 0.5, DATASET_MEAN], ids=["mean", "blur", "half", "dataset"]
)
@pytest.mark.parametrize("metric", ["accuracy", "prob", "logit"])
def test_curves_are_those_of_a_loop_over_images_and_pixels(order, fill, metric):
    model, x, y, saliency = make()
    curve = ga.pixel_perturbation(
        model,
        x,
        y,
        saliency,
        fractions=FRACTIONS,
        order=order,
        fill=fill,
        metric=metric,
        batch_size=5,
    )
    wanted = [brute_force(model, x, y, saliency, f, order, fill, metric) for f in FRACTIONS]
    assert curve.values.tolist() == pytest.approx(wanted, abs=1e-12)
    area = np.diff(FRACTIONS) @ (np.add(wanted[1:], wanted[:-1]) / 2)  # the trapezoidal rule
    assert curve.auc == pytest.approx(area / 0.9, abs=1e-12)


@pytest.mark.parametrize("saliency", ["random", "ties", "constant"])
def test_exactly_the_stated_number_of_pixels_goes(saliency):
    _, x, y, scores = make(channels=1)
    scores = {"random": scores, "ties": scores.round(), "constant": torch.zeros_like(scores)}[
        saliency
    ]
    x = torch.ones_like(x)

    class Count(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            counts = (x == 0).flatten(1).sum(1).double()
            return counts.unsqueeze(1).expand(-1, 3)

    curve = ga.pixel_perturbation(Count(), x, y, scores, fill=0.0, metric="logit")
    assert len(curve.fractions) == 25
    wanted = [max(1, round(float(f) * 36)) for f in default_fractions()]
    assert curve.removed.tolist() == wanted
    assert curve.values.tolist() == wanted


def test_ties_go_by_index():
    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (1, 4)
            seen.append(x.tolist()[0])
            return x[:, :2]

    seen: list[list[float]] = []
    x, scores = torch.ones(1, 4), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    for order in ("lerf", "morf"):
        ga.pixel_perturbation(
            Look(),
            x,
            torch.tensor([0]),
            scores,
            fractions=[0.25, 0.75],
            order=order,
            fill=0.0,
            batch_size=1,
        )
    assert seen == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1], [0, 0, 1, 0]]


def test_all_pixels_gone_leaves_a_constant_image():
    model, x, y, saliency = make()
    full = ga.pixel_perturbation(
        model, x, y, saliency, fractions=[1.0], fill="mean", metric="logit"
    )
    constant = x.mean((2, 3), keepdim=True).expand_as(x)
    wanted = model(constant)[torch.arange(7), y].mean()
    assert full.values.item() == pytest.approx(wanted.detach().item(), abs=1e-12)
    assert full.auc == pytest.approx(full.values.item())


def test_most_relevant_first_is_least_relevant_first_of_the_negative():
    model, x, y, saliency = make()
    morf = ga.pixel_perturbation(model, x, y, saliency, order="morf", metric="prob")
    lerf = ga.pixel_perturbation(model, x, y, -saliency, order="lerf", metric="prob")
    assert torch.equal(morf.values, lerf.values)


def test_the_order_of_the_fractions_does_not_matter():
    model, x, y, saliency = make()
    up = ga.pixel_perturbation(model, x, y, saliency, fractions=FRACTIONS, metric="prob")
    down = ga.pixel_perturbation(model, x, y, saliency, fractions=FRACTIONS[::-1], metric="prob")
    assert up.values.tolist() == down.values.flip(0).tolist()
    assert up.auc == pytest.approx(down.auc)


def test_nothing_of_the_callers_changes():
    model, x, y, saliency = make()
    model.train()
    before = x.clone(), saliency.clone()
    ga.pixel_perturbation(model, x, y, saliency)
    assert model.training
    assert torch.equal(x, before[0])
    assert torch.equal(saliency, before[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fractions": [0.0, 0.5]}, ValueError, r"fractions must be in \(0, 1\]"),
        ({"fractions": [0.5, 1.1]}, ValueError, r"fractions must be in \(0, 1\]"),
        ({"fractions": []}, ValueError, r"fractions must be in \(0, 1\]"),
        ({"fractions": [float("nan")]}, ValueError, r"fractions must be in \(0, 1\]"),
        ({"saliency": torch.zeros(7, 5, 6)}, ValueError, r"saliency must be \(7, 6, 6\)"),
        ({"saliency": torch.zeros(7, 2, 6, 6)}, ValueError, "see reduce_channels"),
        ({"order": "random"}, ValueError, "order must be one of"),
        ({"metric": "loss"}, ValueError, "metric must be one of"),
        ({"fill": "noise"}, ValueError, "fill must be 'mean'"),
        ({"fill": True}, ValueError, "fill must be 'mean'"),
        ({"y": torch.zeros(14, dtype=torch.long)}, ValueError, r"y must have shape \(7,\)"),
        ({"y": torch.zeros(7, 1, dtype=torch.long)}, ValueError, r"y must have shape \(7,\)"),
        ({"y": torch.full((7,), 99)}, ValueError, r"y must be in 0\.\."),
        ({"y": torch.zeros(7)}, ValueError, "y must hold integer class indices"),
        ({"model": lambda x: x.flatten(1).sum(1)}, ValueError, r"must return \(B, C\) logits"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"x": torch.zeros(7, 2, 6, 6, dtype=torch.uint8)}, TypeError, "convert to float"),
        ({"x": torch.zeros(0, 2, 6, 6)}, ValueError, "x is empty"),
    ],
)
def test_bad_input(arguments, error, message):
    model, x, y, saliency = make()
    with pytest.raises(error, match=message):
        ga.pixel_perturbation(**{"model": model, "x": x, "y": y, "saliency": saliency, **arguments})


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
def test_the_curve_is_that_of_quantus_pixel_flipping():
    quantus = pytest.importorskip("quantus")
    model, x, y, saliency = make(channels=1)
    model, x, saliency = model.float().eval(), x.float(), saliency.float()
    metric = quantus.PixelFlipping(
        features_in_step=6,
        perturb_baseline=0.5,  # its mean is that of the image as perturbed so far
        abs=False,
        normalise=False,
        return_aggregate=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    theirs = metric(
        model=model,
        x_batch=x.numpy(),
        y_batch=y.numpy(),
        a_batch=saliency.unsqueeze(1).numpy(),
        device="cpu",
        softmax=True,
    )
    fractions = [k / 6 for k in range(1, 7)]
    ours = ga.pixel_perturbation(
        model, x, y, saliency, fractions=fractions, order="morf", metric="prob", fill=0.5
    )
    assert ours.values.tolist() == pytest.approx(np.asarray(theirs).mean(0)[-6:].tolist(), abs=1e-5)
