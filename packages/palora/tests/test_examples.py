from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import palora
from palora import data
from palora.examples import bytes as byte_models
from palora.examples import digits, quadratic, recipes
from palora.examples.training import TrainConfig, overlay, train

REAL = Path(__file__).parents[4] / "shared" / "data"


def test_composites_are_maxima_of_shifted_digits() -> None:
    a, b = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    canvas = overlay(a, b, 2)
    assert canvas.shape == (3, 10, 10)
    for i in range(10):
        for j in range(10):
            first = a[:, i, j] if i < 8 and j < 8 else torch.zeros(3)
            second = b[:, i - 2, j - 2] if i >= 2 and j >= 2 else torch.zeros(3)
            assert torch.equal(canvas[:, i, j], torch.maximum(first, second))


def test_digits_problem_keeps_train_and_test_images_apart() -> None:
    problem = digits.task(300, 100)
    assert problem.train[0].shape == (300, 100)
    assert problem.test[0].shape == (100, 100)
    assert float(problem.train[0].max()) == 1.0
    again = digits.task(300, 100)
    assert torch.equal(problem.train[0], again.train[0])
    assert not torch.equal(problem.train[0], digits.task(300, 100, seed=1).train[0])
    assert sum(p.numel() for p in problem.build(0).parameters()) == 4_948


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"palora\[data\]"):
        digits.task()


def test_smoke_of_the_study_on_real_digits() -> None:
    """Ten seconds: the front is ordered, and the vertices trade one loss for the other."""
    problem = digits.task(4096, 1000)
    result = train(problem, TrainConfig(epochs=8, every=8, lr=3e-3))
    front = result.fronts[-1]
    assert result.epochs == [8]
    assert front.spearman().max() <= -0.9
    assert front.nondominated().sum() >= 9
    assert front.hypervolume((2.3, 2.3)) > 1.0
    assert np.isnan(result.at_time(0.0, lambda f: 1.0))


@pytest.mark.slow
def test_claims_on_five_fresh_seeds() -> None:
    kept: dict[str, list[float]] = {"anneal": [], "dirichlet": []}
    rho, early, gains = [], [], []
    for seed in range(30, 35):
        problem = digits.task(seed=seed)
        for schedule, counts in kept.items():
            result = train(problem, TrainConfig(seed=seed, schedule=schedule))
            front = result.fronts[-1]
            counts.append(float(front.nondominated().sum()))
            if schedule == "anneal":
                rho.append(float(-front.spearman().mean()))
                metrics: Any = front.metrics
                own = [metrics[front.prefs[:, t].argmax(), t] for t in range(2)]
                gains.append([own[t] - metrics[5, t] for t in range(2)])
                ours = result.fronts[2].hypervolume((2, 2))
        pamal = train(
            problem, TrainConfig(seed=seed, schedule="dirichlet", method="pamal", epochs=10)
        )
        early.append(ours - pamal.fronts[2].hypervolume((2, 2)))
    assert np.median(kept["anneal"]) >= 10.5
    assert np.median(kept["dirichlet"]) < np.median(kept["anneal"])
    assert np.median(rho) >= 0.98
    assert np.median(early) > 0
    assert np.median(gains, axis=0).min() >= 0.01


@pytest.mark.parametrize(
    "centres", [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0, 2], [0, 1, -1], [0, 0, 1.0]]]
)
def test_convex_quadratics_reach_the_analytic_pareto_set(centres: Any) -> None:
    points = torch.tensor(centres)
    assert quadratic.pareto_gap(quadratic.train_quadratic(points, 600), points) < 1e-2


def descend(kind: Any, lam: torch.Tensor) -> torch.Tensor:
    w = torch.tensor([0.1, -0.05], requires_grad=True)
    for rate in (0.1, 0.01, 0.001):
        optimizer = torch.optim.Adam([w], rate)
        for _ in range(400):
            optimizer.zero_grad()
            palora.scalarize(torch.stack(quadratic.vlmop2(w)), lam, kind).backward()
            optimizer.step()
    return torch.stack(quadratic.vlmop2(w)).detach()


def test_linear_scalarisation_misses_the_middle_of_a_concave_front_and_tchebycheff_does_not() -> (
    None
):
    lam = torch.tensor([0.52, 0.48])
    end = descend("linear", lam)
    assert end.min() < 0.05  # at one end, although both weigh about the same
    assert end.max() > 0.95
    weighed = lam * descend("tchebycheff", lam)
    assert abs(float(weighed[0] - weighed[1])) < 0.02  # max λ_t L_t is least where both are equal
    front = quadratic.train_vlmop2("tchebycheff", 600)
    assert front.nondominated().all()
    assert len(quadratic.train_vlmop2("linear", 20)) == 21


def test_byte_model_is_causal_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    prose, source = byte_models.corpora()
    assert len(prose) > 300_000
    assert len(source) > 200_000
    model = byte_models.ByteModel(32, 16).eval()
    x = torch.randint(256, (2, 16))
    changed = x.clone()
    changed[:, -1] += 1
    torch.testing.assert_close(model(x)[:, :-1], model(changed % 256)[:, :-1])
    found = byte_models.train(steps=4, batch=2)
    assert np.shape(found["prose"]) == (3,)
    byte_models.main(["--steps", "1"])
    assert '"prose"' in capsys.readouterr().out


@pytest.mark.slow
def test_byte_model_serves_both_ends_in_one_batch() -> None:
    found = byte_models.train(steps=150)
    assert found["prose"][0] < found["prose"][2]
    assert found["code"][2] < found["code"][0]


def write_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 60) -> None:
    rng = np.random.default_rng(0)
    sums = {}
    for part in ("train", "t10k"):
        arrays = {
            f"{part}-images-idx3-ubyte.gz": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{part}-labels-idx1-ubyte.gz": rng.integers(0, 10, count, dtype=np.uint8),
        }
        for name, array in arrays.items():
            head = bytes([0, 0, 8, array.ndim]) + b"".join(
                n.to_bytes(4, "big") for n in array.shape
            )
            (folder / name).write_bytes(gzip.compress(head + array.tobytes()))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(data, "MNIST_MD5", sums)


def test_mnist_recipes_from_files_in_the_canonical_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    write_mnist(tmp_path, monkeypatch)
    for digits_count in (2, 3):
        images, *labels = data.multimnist("train", tmp_path, digits=digits_count)
        assert images.shape == (60, 1, 28, 28)
        assert len(labels) == digits_count
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert torch.equal(images, data.multimnist("train", tmp_path, digits=digits_count)[0])
    for name, heads in (("multimnist", 2), ("multimnist3", 3)):
        problem = recipes.RECIPES[name].task(tmp_path)
        assert len(problem.names) == heads
        assert len(problem.build(0)(problem.test[0][:2])) == heads
        assert problem.build(heads).encoder[0].in_channels == 1 + heads
    problem = recipes.mnist_composites(_with_folder(tmp_path), 30, 10)
    assert problem.train[0].shape == (30, 1, 28, 28)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"other")
    with pytest.raises(ValueError, match="MD5"):
        data.mnist("t10k", tmp_path)
    with pytest.raises(ValueError, match="part must be"):
        data.mnist("x", tmp_path)
    with pytest.raises(ValueError, match="digits must be"):
        data.multimnist("train", tmp_path, digits=4)


def _with_folder(folder: Path) -> Path:
    inner = folder / "outer" / "mnist-test"
    inner.mkdir(parents=True)
    for path in folder.glob("t10k*"):
        (inner / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(1)
    # the example needs more than 8,000 images: blanks with labels do
    big = {
        "images-idx3": np.zeros((8004, 28, 28), np.uint8),
        "labels-idx1": rng.integers(0, 10, 8004, dtype=np.uint8),
    }
    for kind, array in big.items():
        name = f"t10k-{kind}-ubyte.gz"
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (inner / name).write_bytes(gzip.compress(head + array.tobytes()))
        data.MNIST_MD5[name] = hashlib.md5((inner / name).read_bytes()).hexdigest()
    return folder / "outer"


def test_sarcos_census_and_faces_from_files(tmp_path: Path) -> None:
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    savemat(tmp_path / "sarcos_inv.mat", {"sarcos_inv": rng.random((4600, 28))})
    savemat(tmp_path / "sarcos_inv_test.mat", {"sarcos_inv_test": rng.random((50, 28))})
    parts = data.sarcos(tmp_path)
    assert {k: len(v[0]) for k, v in parts.items()} == {"train": 152, "val": 4448, "test": 50}
    torch.testing.assert_close(torch.quantile(parts["train"][1], 0.9, dim=0), torch.ones(7))
    problem = recipes.RECIPES["sarcos"].task(tmp_path)
    assert len(problem.losses(problem.build(0)(problem.test[0]), *problem.test[1:])) == 7
    assert (tmp_path / data.LOCK).exists()
    (tmp_path / "sarcos_inv_test.mat").write_bytes(b"tampered")
    with pytest.raises(ValueError, match="SHA-256"):
        data.sarcos(tmp_path)

    rows = [
        f"{20 + i}, a{i % 3}, {i}, x, {'Bachelors degree' if i % 2 else 'Children'}, y"
        for i in range(40)
    ]
    for name in ("census-income.data.gz", "census-income.test.gz"):
        (tmp_path / name).write_bytes(gzip.compress("\n".join([*rows, ""]).encode()))
    problem = recipes.RECIPES["census"].task(tmp_path)
    features, old, degree = problem.train
    assert features.shape == (40, 3 + 1 + 1 + 1)
    assert int(old.sum()) == 19
    assert int(degree.sum()) == 20

    image = pytest.importorskip("PIL.Image")
    (tmp_path / "UTKFace").mkdir()
    for i in range(10):
        image.new("RGB", (8, 8), (i, 0, 0)).save(
            tmp_path / "UTKFace" / f"{20 + i}_{i % 2}_{i % 5}_x.jpg"
        )
    pytest.importorskip("torchvision")
    problem = recipes.RECIPES["utkface"].task(tmp_path)
    assert problem.train[0].shape == (7, 3, 64, 64)
    assert abs(float(problem.train[1].mean())) < 1e-6
    out = problem.build(0).eval()(problem.test[0])
    assert len(recipes.face_losses(out, *problem.test[1:])) == 3
    with pytest.raises(ValueError, match="COSMOS"):
        problem.build(3)
    with pytest.raises(OSError, match="no <age>"):
        data.utkface(tmp_path / "none")
    with pytest.raises(OSError, match="no CSV"):
        data.adult(tmp_path)


def test_downloads_are_announced_verified_and_atomic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "remote"
    source.mkdir()
    (source / "file").write_bytes(b"content")
    url, target = source.as_uri() + "/", tmp_path / "cache"
    path = data.fetch("file", url, target, hashlib.md5(b"content").hexdigest())
    assert path.read_bytes() == b"content"
    assert "downloading" in capsys.readouterr().err
    (source / "file").unlink()
    assert data.fetch("file", url, target) == path  # cached, and its SHA-256 recorded
    with pytest.raises(OSError, match="other"):
        data.fetch("other", url, target)
    assert not [p for p in target.iterdir() if p.suffix == ".tmp"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data.default_dir() == tmp_path / "palora"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data.default_dir().parts[-2:] == ("Caches", "palora")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert data.default_dir() == tmp_path / "palora"


@pytest.mark.skipif(not (REAL / "adult").is_dir(), reason="the Adult data are not at hand")
def test_adult_has_its_rows() -> None:
    features, rich, single = data.adult(REAL)
    assert len(features) == 32_561
    assert (int(rich.sum()), int(single.sum())) == (7_841, 10_683)


def test_methods_train_by_one_loop() -> None:
    problem = digits.task(512, 128)
    for method in ("palora", "pamal", "cosmos", "phn", "linear"):
        result = train(problem, TrainConfig(method=method, epochs=2, every=2))
        assert isinstance(result.model, nn.Module)
        assert len(result.fronts[-1]) == (1 if method == "linear" else 11)
        assert np.isfinite(result.fronts[-1].losses).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("conv", ["folded", "spatial"])
def test_gpu_smoke(conv: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    model = palora.inject(net, 2, rank=2, conv=conv).cuda()
    rays = torch.tensor([[0.2, 0.8], [0.7, 0.3]])
    x = torch.randn(5, 3, 8, 8, device="cuda")
    out = palora.multi(model.eval(), rays, x)
    for i, lam in enumerate(rays):
        torch.testing.assert_close(out[i], palora.merge(model, lam)(x), rtol=1e-3, atol=1e-3)
