"""Judging a saved run: which weights, which distances, and FID by torch-fidelity against our own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch

from lookahead_minmax import plot
from lookahead_minmax.cli import main
from lookahead_minmax.gan import evaluate
from lookahead_minmax.gan.train import Recipe, feature_extractor, load_images, train
from lookahead_minmax.metrics import feature_distance, inception_score

mpl.use("Agg")


def saved(folder: Path, **settings: Any) -> tuple[Recipe, Any, torch.nn.Module]:
    """Run a recipe into a folder; the last round is its last evaluation."""
    recipe = Recipe(**settings)
    images, labels = load_images(recipe)
    features = feature_extractor(images, labels, steps=20)
    curve = train(recipe, images, features, checkpoint=folder / "checkpoint.pt")
    return recipe, curve, features


@pytest.mark.parametrize("base", ["alt", "extra"])
def test_saved_generators_have_the_distances_that_the_run_reported(
    base: Any, tmp_path: Path
) -> None:
    """At a round between synchronisations (10 of k = 4), so that live and slow weights differ."""
    recipe, curve, features = saved(tmp_path, base=base, rounds=10, evaluations=2, k=(4,), ema=0.9)
    run = evaluate.load_run(tmp_path)
    assert run.recipe == recipe
    assert run.rounds == 10
    assert set(run.generators) == {"live", "ema", "slow", "ema_slow"}
    images, _ = load_images(recipe)
    for which in ("live", "ema", "ema_slow"):
        made = run.sample(which, len(images), seed=12345)  # the noise of the run's evaluations
        assert feature_distance(features(images), features(made)) == getattr(curve, which)[-1]
    at_sync, *_ = saved(tmp_path / "sync", base=base, rounds=8, evaluations=2, k=(4,), ema=0.9)
    assert at_sync.rounds == 8
    again = evaluate.load_run(tmp_path / "sync").generators["live"]
    for slow, live in zip(run.generators["slow"].parameters(), again.parameters(), strict=True):
        assert torch.equal(slow, live)  # the slow weights at 10 are the weights after the sync at 8


def test_eval_without_lookahead_on_pixels_of_its_own_range(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    common = ["--quiet", "--json"]
    assert main(["gan", "--rounds", "12", "--scale", "0_1", "--out", run, *common]) == 0
    reported = json.loads(capsys.readouterr().out)
    out = tmp_path / "judged"
    assert main(["eval", run, "--seed", "12345", "--out", str(out), *common]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert set(judged) == {"rounds", "samples", "live", "ema"}
    assert judged["live"]["distance"] == reported["live"][-1]
    assert judged["ema"]["distance"] == reported["ema"][-1]
    assert json.loads((out / "result.json").read_text()) == judged
    assert (out / "figure.png").stat().st_size > 5000


def test_eval_of_the_ring_counts_modes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    common = ["--quiet", "--json"]
    arguments = ["gan", "--data", "ring", "--rounds", "12", "--k", "5", "--out", run, *common]
    assert main(arguments) == 0
    coverage = json.loads(capsys.readouterr().out)["coverage"]
    judge = ["eval", run, "--seed", "12345", "--samples", "1000", "--out", run, *common]
    assert main(judge) == 0
    live = json.loads(capsys.readouterr().out)["live"]
    assert {name: live[name] for name in coverage} == coverage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NOWHERE"], "No such file"),
        (["DAMAGED"], "no checkpoint of a GAN run"),
        (["OTHER"], "no checkpoint of a GAN run"),
        (["RUN", "--samples", "1"], "samples must be at least 2, got 1"),
        (["RUN", "--fid"], "FID is of images: real has the shape (2000, 2)"),
        (["RUN", "--inception", "weights.pth"], "--inception belongs to --fid"),
    ],
)
def test_bad_input_is_status_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("DAMAGED", "OTHER", "RUN"):
        (tmp_path / name).mkdir()
    (tmp_path / "DAMAGED" / "checkpoint.pt").write_bytes(b"damaged")
    torch.save({"weight": torch.ones(1)}, tmp_path / "OTHER" / "checkpoint.pt")
    saved(tmp_path / "RUN", data="ring", rounds=2, evaluations=1)
    folder, *rest = arguments
    assert main(["eval", str(tmp_path / folder), *rest]) == 2
    assert message in capsys.readouterr().err


def test_inception_refuses_what_it_cannot_judge(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, made = torch.zeros(2, 12, 1, 8, 8)
    with pytest.raises(ValueError, match="made has the shape"):
        evaluate.inception(real, made.expand(-1, 2, -1, -1))
    with pytest.raises(ValueError, match="at least 10 images, made has 9"):
        evaluate.inception(real, made[:9])
    with pytest.raises(FileNotFoundError, match="no file of Inception weights"):
        evaluate.inception(real, made, weights=tmp_path / "none.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"lookahead-minmax\[fid\]"):
        evaluate.inception(real, made)


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, Path]:
    """A linear map where torch-fidelity has Inception, whose weights would be a download of 91 MB."""
    from torch_fidelity import feature_extractor_base, registry

    pixels, features, classes = 3 * 8 * 8, 6, 5
    weights = torch.randn(pixels, features + classes, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "weights.pth"
    torch.save(weights, path)

    def outputs(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8
        result = (images.flatten(1).float() / 255 - 0.5) @ weights
        return result[:, :features], result[:, features:]

    class Small(feature_extractor_base.FeatureExtractorBase):
        def __init__(self, name, wanted, feature_extractor_weights_path, **_: Any) -> None:
            super().__init__(name, wanted)
            assert torch.equal(torch.load(feature_extractor_weights_path), weights)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return {"fid": "features", "isc": "logits"}[metric]

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = outputs(images.cpu())
            both = dict(zip(self.get_provided_features_list(), found, strict=True))
            return tuple(both[name] for name in self.features_list)

    monkeypatch.setitem(
        registry.FEATURE_EXTRACTORS_REGISTRY,
        "inception-v3-compat",
        Small,
    )
    return outputs, path


@pytest.mark.parametrize("scale", ["-1_1", "0_1"])
def test_fid_of_a_saved_run_is_our_distance_of_the_same_features(
    scale: Any, small_inception: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    outputs, weights = small_inception
    saved(tmp_path, rounds=6, evaluations=1, k=(4,), scale=scale)
    judge = ["eval", str(tmp_path), "--fid", "--inception", str(weights), "--samples", "200"]
    assert main([*judge, "--json"]) == 0
    captured = capsys.readouterr()
    assert "slow: Inception features" in captured.err
    judged = json.loads(captured.out)
    images, _ = load_images(Recipe(scale=scale))
    run = evaluate.load_run(tmp_path)
    for which in ("live", "ema", "slow", "ema_slow"):

        def rgb(part: torch.Tensor) -> torch.Tensor:
            if scale == "-1_1":
                part = (part + 1) / 2
            whole = (part.clamp(0, 1) * 255).round().byte()
            return whole.view(-1, 1, 8, 8).repeat(1, 3, 1, 1)

        (real, _), (fake, logits) = outputs(rgb(images)), outputs(rgb(run.sample(which, 200)))
        # float32 features, whose covariances the two sum in another order
        assert judged[which]["fid"] == pytest.approx(feature_distance(real, fake), rel=1e-4)
        shuffled = logits[np.random.RandomState(2020).permutation(200)]
        mean, deviation = inception_score(shuffled.double().softmax(1))
        assert judged[which]["inception_score"] == pytest.approx(mean, rel=1e-6)
        assert judged[which]["inception_score_std"] == pytest.approx(deviation, rel=1e-5)


def test_samples_are_drawn_as_a_grid_or_as_points() -> None:
    images = torch.arange(26.0)[:, None].expand(26, 16)
    axes = plot.plot_samples({"a": images[:25], "b": images[1:4]})
    picture = axes.images[0].get_array()
    assert picture.shape == (20, 42)
    assert (picture[4:8, 4:8] == 6).all()  # second row, second column
    assert (picture[:4, 22:26] == 1).all()
    mpl.pyplot.close(axes.figure)
    axes = plot.plot_samples({"points": torch.ones(3, 2)})
    assert axes.lines[0].get_xydata().shape == (3, 2)
    mpl.pyplot.close(axes.figure)
