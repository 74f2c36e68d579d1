"""Networks, data files and training of the GAN experiments."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lookahead_minmax.cli import main
from lookahead_minmax.gan import data, models
from lookahead_minmax.gan.train import Recipe, feature_extractor, train
from lookahead_minmax.gan.unrolled import unroll_adam


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet_pair_has_the_papers_parameter_counts() -> None:
    generator, discriminator = models.resnet32()
    assert (count(generator), count(discriminator)) == (4_079_363, 1_053_825)
    images = generator(torch.randn(2, 128))
    assert images.shape == (2, 3, 32, 32)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


def test_dcgan_pair_maps_noise_to_images_without_biases() -> None:
    generator, discriminator = models.dcgan28()
    images = generator(torch.randn(2, 128, 1, 1))
    assert images.shape == (2, 1, 28, 28)
    assert discriminator(images).shape == (2,)
    convolutions = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    layers = [m for net in (generator, discriminator) for m in net if isinstance(m, convolutions)]
    assert len(layers) == 8
    assert all(layer.bias is None for layer in layers)


def test_digits_are_scaled_to_the_tanh_range() -> None:
    images, labels = data.digits()
    assert images.shape == (1797, 64)
    assert (images.min(), images.max()) == (-1, 1)
    assert labels.bincount().sum() == 1797


def idx(values: torch.Tensor) -> bytes:
    header = b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return gzip.compress(header + bytes(values.flatten().tolist()))


@pytest.fixture
def mnist_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tiny files in MNIST's format, whose checksums are the expected ones."""
    images = torch.arange(2 * 28 * 28).remainder(256).view(2, 28, 28)
    files = {
        "t10k-images-idx3-ubyte.gz": idx(images),
        "t10k-labels-idx1-ubyte.gz": idx(torch.tensor([3, 7])),
    }
    folder = tmp_path / "mnist-test"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
        monkeypatch.setitem(data.MNIST_MD5, name, hashlib.md5(content).hexdigest())
    return tmp_path


def test_mnist_is_read_from_its_own_files(mnist_folder: Path) -> None:
    for folder in (mnist_folder, mnist_folder / "mnist-test"):
        images, labels = data.mnist(folder)
        assert images.shape == (2, 1, 28, 28)
        assert images[0, 0, 0, 0] == -1
        assert images[0, 0, 9, 3] == 1  # pixel 255
        assert labels.tolist() == [3, 7]


def test_download_is_verified_and_cached(
    mnist_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = (mnist_folder / "mnist-test").as_uri() + "/"
    name = "t10k-labels-idx1-ubyte.gz"
    path = data.fetch(name, tmp_path / "cache", url)
    assert "downloading" in capsys.readouterr().err
    assert data.read_idx(path).tolist() == [3, 7]
    data.fetch(name, tmp_path / "cache", "file:///nowhere/")
    assert capsys.readouterr().err == ""
    with pytest.raises(OSError, match="has the checksum"):
        data.fetch(name, tmp_path / "other", url, md5="0" * 32)
    assert not list((tmp_path / "other").iterdir())
    path.write_bytes(b"damaged")
    with pytest.raises(OSError, match="remove it and try again"):
        data.fetch(name, tmp_path / "cache", url)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "no IDX file"),
        (b"\x00\x00\x0d\x01", "no IDX file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05ab", "holds 2"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(OSError, match=message):
        data.read_idx(path)


def test_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data.default_folder() == tmp_path / "lookahead-minmax"
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr(sys, "platform", "win32")
    assert data.default_folder() == tmp_path / "local" / "lookahead-minmax"


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"lookahead-minmax\[gan\]"):
        data.digits()


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.nn.Module]:
    images, labels = data.digits()
    return images, feature_extractor(images, labels, steps=200)


def test_features_are_penultimate_and_leave_the_random_state_alone(digits: Any) -> None:
    images, features = digits
    assert features(images[:5]).shape == (5, 32)
    state = torch.get_rng_state()
    feature_extractor(images[:50], torch.zeros(50, dtype=torch.long), steps=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("base", ["alt", "extra"])
@pytest.mark.parametrize("k", [(), (5,), (2, 4)])
def test_training_is_deterministic_and_reports_every_average(
    digits: Any, base: Any, k: Any
) -> None:
    images, features = digits
    recipe = Recipe(base=base, k=k, rounds=20, evaluations=4, d_iters=2, ema=0.9)
    curves = [train(recipe, images, features) for _ in range(2)]
    assert curves[0].as_dict() == curves[1].as_dict()
    assert curves[0].rounds == [5, 10, 15, 20]
    assert len(curves[0].ema) == 4
    assert len(curves[0].ema_slow) == (4 if k else 0)
    assert curves[0].samples.shape == (25, 64)
    assert set(curves[0].summary()) == {"best", "last", "mean", "std"}


def test_alpha_one_trains_the_same_generator_as_the_base(digits: Any) -> None:
    images, features = digits
    plain = train(Recipe(rounds=12, evaluations=3), images, features)
    same = train(Recipe(rounds=12, evaluations=3, k=(3,), alpha=1.0), images, features)
    assert plain.live == same.live


def test_progress_is_reported(digits: Any) -> None:
    images, features = digits
    seen: list[int] = []
    train(Recipe(rounds=4, evaluations=2), images, features, lambda done, _: seen.append(done))
    assert seen == [2, 4]


@pytest.mark.slow
def test_lookahead_reaches_a_low_distance_sooner(digits: Any) -> None:
    """Digits, three paired seeds, mean of the live distances over the second half of 1500 rounds."""
    images, features = digits
    means = []
    for k in ((), (5,)):
        curves = [train(Recipe(rounds=1500, k=k, seed=s), images, features) for s in range(3)]
        means.append(sum(sum(curve.live[6:]) for curve in curves))
    assert means[1] < means[0]


def tiny_game() -> tuple[torch.nn.Module, torch.optim.Adam, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05, betas=(0.3, 0.9))
    x, theta = torch.randn(2, 6, 3, dtype=torch.float64)
    for _ in range(2):  # the moments are no longer zero
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return net, optimizer, x, theta


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("maximize", [False, True])
def test_unrolled_network_is_the_network_after_the_optimizers_own_steps(steps, maximize) -> None:
    net, optimizer, x, theta = tiny_game()
    optimizer.param_groups[0]["maximize"] = maximize
    before = [p.detach().clone() for p in net.parameters()]
    ahead = unroll_adam(net, optimizer, lambda f: (f(x) - f(theta)).square().mean(), steps)(x)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - net(theta)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(ahead, net(x), rtol=0, atol=1e-12)


def test_gradient_through_the_unrolled_steps_is_that_of_finite_differences() -> None:
    net, optimizer, x, theta = tiny_game()

    def outcome(point: torch.Tensor) -> torch.Tensor:
        ahead = unroll_adam(net, optimizer, lambda f: (f(x) - f(point)).mean(), 3)
        return ahead(point).square().sum()

    assert torch.autograd.gradcheck(outcome, theta.requires_grad_())


def test_weights_without_gradient_unroll_to_finite_gradients_and_buffers_stay() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.ReLU())
    torch.nn.init.constant_(net[1].bias, -100.0)  # every unit is dead
    before = {name: value.clone() for name, value in net.named_buffers()}
    optimizer = torch.optim.Adam(net.parameters())
    point = torch.randn(5, 2, requires_grad=True)
    ahead = unroll_adam(net, optimizer, lambda f: f(point).sum(), 2)
    (gradient,) = torch.autograd.grad(ahead(point).sum(), point)
    assert gradient.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_unrolling_refuses_what_it_does_not_compute() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    net = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="at least 0"):
        unroll_adam(net, torch.optim.Adam(net.parameters()), lambda f: f(weight).sum(), -1)
    with pytest.raises(ValueError, match="weight decay"):
        unroll_adam(net, torch.optim.Adam([weight], weight_decay=0.1), lambda f: f(weight).sum(), 1)
    groups = torch.optim.Adam([{"params": [weight]}, {"params": list(net.parameters())}])
    with pytest.raises(ValueError, match="one parameter group"):
        unroll_adam(net, groups, lambda f: f(weight).sum(), 1)


def test_unrolled_gan_trains_and_no_unrolled_step_is_alternating_descent() -> None:
    images, labels = data.digits()
    features = feature_extractor(images, labels, steps=50)
    common: dict[str, Any] = {"rounds": 20, "evaluations": 2}
    alternating = train(Recipe(**common), images, features)
    none = train(Recipe(base="unrolled", unroll=0, **common), images, features)
    some = train(Recipe(base="unrolled", unroll=3, k=(5,), **common), images, features)
    assert none.live == alternating.live
    assert some.live != alternating.live
    assert all(map(math.isfinite, some.live))


def test_ring_has_eight_modes_that_its_own_points_cover() -> None:
    points, modes = data.ring(4000, seed=3)
    assert torch.equal(points, data.ring(4000, seed=3)[0])
    for mode, centre in enumerate(data.ring_centres()):
        own = points[modes == mode]
        assert abs(float(centre.norm()) - 1) < 1e-6
        # the mean of about 500 points, five standard errors
        assert (own.mean(0) - centre).abs().max() < 5 * data.RING_DEVIATION / len(own) ** 0.5
        assert float((own - centre).std()) == pytest.approx(data.RING_DEVIATION, rel=0.1)


def test_ring_gan_reports_its_coverage(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gan", "--data", "ring", "--rounds", "24", "--k", "5", "--json", "--quiet"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["coverage"]["modes"] <= 8
    assert 0 <= result["coverage"]["quality"] <= 1
    assert len(result["live"]) == 12


def test_every_base_optimizer_trains_and_unrolling_needs_adam() -> None:
    points, modes = data.ring(200)
    features = feature_extractor(points, modes, steps=20)
    common: dict[str, Any] = {"data": "ring", "rounds": 12, "evaluations": 2, "k": (3,)}
    runs = [train(Recipe(optim=o, **common), points, features) for o in ("adam", "radam", "sgd")]
    assert len({tuple(run.live) for run in runs}) == 3
    assert all(math.isfinite(value) for run in runs for value in run.live)
    with pytest.raises(ValueError, match="differentiates Adam's steps"):
        train(Recipe(optim="sgd", base="unrolled", **common), points, features)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k": (3, 6)},
        {"base": "extra", "d_iters": 2, "k": (5,)},
        {"base": "unrolled", "unroll": 2, "k": (5,)},
    ],
)
def test_interrupted_run_goes_on_bit_for_bit(settings: Any, tmp_path: Path) -> None:
    points, modes = data.ring(200)
    features = feature_extractor(points, modes, steps=5)
    recipe = Recipe(data="ring", rounds=16, evaluations=4, **settings)
    whole = train(recipe, points, features)

    def interrupt(done: int, distance: float) -> None:
        if done == 8:
            raise Interrupted

    file = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(Interrupted):
        train(recipe, points, features, interrupt, checkpoint=file)
    seen: list[int] = []
    resumed = train(
        recipe,
        points,
        features,
        lambda done, distance: seen.append(done),
        checkpoint=file,
        resume=True,
    )
    assert seen == [12, 16]
    assert resumed.as_dict() == whole.as_dict()
    assert torch.equal(resumed.samples, whole.samples)
    with pytest.raises(ValueError, match=r"other settings: \['lr', 'seed'\]"):
        train(replace(recipe, lr=0.5, seed=2), points, features, checkpoint=file, resume=True)
