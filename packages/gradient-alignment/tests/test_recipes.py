from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_net

from gradient_alignment import plots
from gradient_alignment.recipes import data as D
from gradient_alignment.recipes import models as M
from gradient_alignment.recipes.bench import compare_estimators
from gradient_alignment.recipes.evaluate import (
    drawn_pattern,
    evaluate,
    mean_trace,
    nearest_distance,
    svm_judge,
)
from gradient_alignment.recipes.train import (
    CIFAR_SCHEDULE,
    Config,
    augment,
    load_checkpoint,
    make_regularizer,
    save,
    train,
)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


# ---- networks


@pytest.mark.parametrize(
    ("make", "convolutions", "linear"),
    [
        (lambda: M.resnet(9), 9 + 3, 1),  # stem, eight in blocks, three shortcuts
        (lambda: M.resnet(18), 17 + 3, 1),
        (lambda: M.resnet(34), 33 + 3, 1),
        (lambda: M.vgg(5), 4, 1),
        (lambda: M.vgg(7), 6, 1),
        (lambda: M.vgg(11), 10, 1),
        (lambda: M.vgg(14), 13, 1),
    ],
)
def test_cifar_networks_have_their_layers_and_no_relu(make, convolutions, linear):
    with torch.device("meta"):
        net = make()
    kinds = [type(module).__name__ for module in net.modules()]
    assert kinds.count("Conv2d") == convolutions
    assert kinds.count("Linear") == linear
    assert "ReLU" not in kinds
    with torch.device("meta"):
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_sizes_are_those_of_the_literature():
    with torch.device("meta"):
        assert M.count_parameters(M.resnet(18, 10)) == 11_173_962  # the usual CIFAR ResNet-18
        assert M.count_parameters(M.resnet(34, 10)) == 21_282_122


def test_networks_by_name_fit_the_images():
    assert M.make("small-cnn", 10, (1, 28, 28))(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert M.make("small-cnn", 4, (3, 9, 9))(torch.zeros(2, 3, 9, 9)).shape == (2, 4)
    assert M.make("vgg5", 7, (1, 32, 32))(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert M.make("resnet9", 7, (1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    with pytest.raises(ValueError, match="vgg11 takes 32x32 images"):
        M.make("vgg11", 10, (3, 28, 28))
    with pytest.raises(ValueError, match="model must be one of"):
        M.make("alexnet", 10, (3, 32, 32))
    with pytest.raises(ValueError, match="depth must be 9, 18 or 34"):
        M.resnet(50)
    with pytest.raises(ValueError, match="depth must be 5, 7, 11 or 14"):
        M.vgg(16)


# ---- data


def test_digits_are_split_by_class_and_seed():
    data = D.digits(0)
    assert data.train_x.shape == (1258, 1, 8, 8)
    assert data.test_x.shape == (539, 1, 8, 8)
    assert (float(data.train_x.min()), float(data.train_x.max())) == (0, 1)
    share = torch.bincount(data.train_y) / (
        torch.bincount(data.train_y) + torch.bincount(data.test_y)
    )
    assert (share - 0.7).abs().max() < 0.005
    assert torch.equal(data.train_x, D.digits(0).train_x)
    assert not torch.equal(data.train_x, D.digits(1).train_x)
    rows = torch.cat([data.train_x, data.test_x]).flatten(1)
    other = D.digits(1)
    again = torch.cat([other.train_x, other.test_x]).flatten(1)
    assert torch.equal(rows.sum(1).sort().values, again.sum(1).sort().values)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def mnist_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    sources = {}
    for part, count in (("train", 6), ("test", 4)):
        images, labels = D.MNIST[part]
        write_idx(folder / images.name, source.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(folder / labels.name, source.integers(0, 10, count).astype(np.uint8))
        sources[part] = tuple(
            D.Source(each.url, md5(folder / each.name)) for each in (images, labels)
        )
    monkeypatch.setattr(D, "MNIST", sources)
    return tmp_path


def test_mnist_is_read_from_its_files(mnist_files: Path):
    source = np.random.default_rng(0)
    train = source.integers(0, 256, (6, 28, 28), np.uint8)
    labels = source.integers(0, 10, 6).astype(np.uint8)
    found = D.load("mnist", mnist_files)
    assert torch.equal(found.train_x, torch.from_numpy(train).unsqueeze(1) / 255)
    assert found.train_y.tolist() == labels.tolist()
    assert found.test_x.shape == (4, 1, 28, 28)
    small = D.load("mnist-test", mnist_files / "mnist")
    assert torch.equal(small.train_x, found.test_x)
    assert len(small.test_x) == 0  # 8,000 and the rest


def test_damaged_files_are_refused_and_stay(mnist_files: Path):
    path = mnist_files / "mnist" / D.MNIST["test"][0].name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(OSError, match=r"has the md5 .* instead of .*: remove it and try again"):
        D.mnist(mnist_files)
    assert path.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08\x01\0\0\0\x05ab", b"\0\0\x0d\x01\0\0\0\x01a", b"\0\0\x08\x03\0\0"]
)
def test_files_that_are_no_idx_are_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(OSError, match="is no whole IDX file"):
        D.read_idx(path)


def test_downloads_are_verified_and_appear_whole(tmp_path: Path, capsys):
    origin = tmp_path / "server" / "file.bin"
    origin.parent.mkdir()
    origin.write_bytes(b"content")
    folder = tmp_path / "cache"
    good = D.Source(origin.as_uri(), md5(origin))
    path = D.obtain(good, folder)
    assert path.read_bytes() == b"content"
    assert "downloading" in capsys.readouterr().err
    origin.unlink()
    assert D.obtain(good, folder) == path  # from the cache
    path.unlink()
    origin.write_bytes(b"tampered")
    with pytest.raises(OSError, match="instead of"):
        D.obtain(good, folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(OSError, match="urlopen error"):
        D.obtain(D.Source((tmp_path / "absent").as_uri(), ""), folder)
    assert list(folder.iterdir()) == []


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(D.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert D.cache() == tmp_path / "gradient-alignment"
    monkeypatch.setattr(D.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert D.cache() == tmp_path / "local" / "gradient-alignment"


def cifar_archive(path: Path, batches: dict[str, object], key: bytes) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in batches.items():
            body = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))


def use(monkeypatch: pytest.MonkeyPatch, classes: int, path: Path) -> None:
    source = D.Source(D.CIFAR[classes].url, md5(path))
    monkeypatch.setattr(D, "CIFAR", {**D.CIFAR, classes: source})


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_its_archive(classes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = np.random.default_rng(0)
    key = b"labels" if classes == 10 else b"fine_labels"
    train = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    test = "test_batch" if classes == 10 else "test"
    batches = {
        name: {
            b"data": source.integers(0, 256, (3, 3072), np.uint8),
            key: source.integers(0, classes, 3).tolist(),
        }
        for name in [*train, test]
    }
    path = tmp_path / D.CIFAR[classes].name
    cifar_archive(path, {**batches, "readme.html": "x"}, key)
    use(monkeypatch, classes, path)
    found = D.load(f"cifar{classes}", tmp_path)
    wanted = np.concatenate([batches[name][b"data"] for name in train])
    assert torch.equal(
        found.train_x, torch.from_numpy(wanted.reshape(-1, 3, 32, 32).astype(np.float32)) / 255
    )
    assert found.train_y.tolist() == [label for name in train for label in batches[name][key]]
    assert found.test_y.tolist() == batches[test][key]
    assert found.num_classes == classes


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_archives_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = tmp_path / D.CIFAR[100].name
    cifar_archive(path, {"train": Evil()}, b"")
    use(monkeypatch, 100, path)
    with pytest.raises(OSError, match=r"is no archive of CIFAR-100: refused .*print"):
        D.cifar(100, tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_archives_of_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / D.CIFAR[10].name
    cifar_archive(path, {"other": {}}, b"")
    use(monkeypatch, 10, path)
    with pytest.raises(OSError, match="is no archive of CIFAR-10"):
        D.cifar(10, tmp_path)
    with pytest.raises(ValueError, match="num_classes must be 10 or 100"):
        D.cifar(20, tmp_path)
    with pytest.raises(ValueError, match="dataset must be one of"):
        D.load("svhn")


# ---- training and evaluation


def tiny(data: D.Split, count: int = 200) -> D.Split:
    rows = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[:count]
    return D.Split(
        data.train_x[rows], data.train_y[rows], data.test_x[:60], data.test_y[:60], data.num_classes
    )


@pytest.mark.parametrize("regularizer", ["none", "score", "anti", "gradient-norm"])
def test_training_is_seeded_and_learns(regularizer):
    data = tiny(D.digits())
    config = Config(regularizer=regularizer, epochs=2)
    reports = []
    runs = [train(data, config, lambda e, loss: reports.append(e)) for _ in range(2)]
    assert reports == [1, 2, 1, 2]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses[1] < runs[0].losses[0]
    assert not runs[0].model.training
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert bool(runs[0].terms) == (regularizer != "none")


def test_the_papers_schedule_falls_twice_and_augments():
    images = torch.rand(24, 3, 32, 32)
    data = D.Split(images, torch.arange(24) % 3, images[:6], torch.arange(6) % 3, 3)
    settings = {**CIFAR_SCHEDULE, "model": "vgg5", "epochs": 4, "batch_size": 12}
    trained = train(data, Config(**settings, regularizer="score", preset="code"))
    assert len(trained.losses) == 4
    assert all(np.isfinite(trained.losses))
    with pytest.raises(ValueError, match="schedule must be"):
        train(data, Config(model="vgg5", schedule="cosine"))


def test_augmentation_shifts_by_up_to_four_and_flips():
    torch.manual_seed(0)
    x = torch.arange(1.0, 65.0).view(1, 1, 8, 8).repeat(200, 2, 1, 1)
    found = augment(x)
    assert found.shape == x.shape
    padded = torch.nn.functional.pad(x[:1], (4, 4, 4, 4))
    views = [
        view
        for i in range(9)
        for j in range(9)
        for view in (padded[..., i : i + 8, j : j + 8], padded[..., i : i + 8, j : j + 8].flip(3))
    ]
    kinds = set()
    for image in found:
        matches = [k for k, view in enumerate(views) if torch.equal(view[0], image)]
        assert matches
        kinds.add(matches[0])
    assert len(kinds) > 80  # of 162


def test_presets_and_options_reach_the_regularizer():
    made = make_regularizer(Config(regularizer="score", preset="code", options={"num_samples": 3}))
    assert (made.weight, made.estimator, made.num_samples, made.bn) == (1e-5, "taylor", 3, "batch")
    assert make_regularizer(Config()) is None
    with pytest.raises(ValueError, match="regularizer must be one of"):
        make_regularizer(Config(regularizer="dropout"))


def test_checkpoints_make_the_same_network(tmp_path: Path):
    data = tiny(D.digits())
    trained = train(data, Config(epochs=1))
    save(trained, tmp_path / "x.pt", data)
    model, facts = load_checkpoint(tmp_path / "x.pt")
    assert torch.equal(model(data.test_x), trained.model(data.test_x))
    assert facts["accuracy"] == trained.accuracy
    assert not model.training
    (tmp_path / "y.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_checkpoint(tmp_path / "y.pt")
    with pytest.raises(OSError, match="No such file"):
        load_checkpoint(tmp_path / "absent.pt")


def test_evaluation_repeats_and_has_every_number():
    data = tiny(D.digits())
    model = train(data, Config(epochs=2)).model
    runs = [
        evaluate(model, data, svm_judge(data), num_samples=20, steps=5, num_images=30)
        for _ in range(2)
    ]
    assert runs[0].summary() == runs[1].summary()
    assert set(runs[0].summary()) == {
        *("accuracy", "trace", "gradient", "gan_test", "distance", "alignment", "density"),
        *("lerf_auc", "morf_auc"),
    }
    assert runs[0].samples.shape == (20, 1, 8, 8)
    assert list(runs[0].density) == [0.1, 0.3]


def test_the_svm_judge_is_a_good_one():
    data = D.digits()
    found = svm_judge(data)(data.test_x)
    assert (found == data.test_y).double().mean() > 0.98


def test_nearest_distances_are_those_of_a_loop():
    a, b = torch.rand(2, 5, 1, 3, 3)
    wanted = [min(float((x - z).norm()) for z in b) for x in a]
    assert nearest_distance(a, b).tolist() == pytest.approx(wanted, abs=1e-5)


def test_large_inputs_are_traced_by_draws_near_the_exact_value():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 8), torch.nn.Softplus(), torch.nn.Linear(8, 2))
    x, y = torch.randn(4, 300), torch.tensor([0, 1, 1, 0])
    # the Hessian is W' diag W: sum_k w2 s''(z_k) |w_k|^2
    z = model[0](x)
    curvature = z.sigmoid() * (1 - z.sigmoid())
    exact = (model[2].weight[y] * curvature * model[0].weight.square().sum(1)).sum(1).mean()
    found = mean_trace(model, x, y, num_samples=400)
    assert found == pytest.approx(float(exact.detach()), rel=0.05)


def test_the_pattern_has_norm_one():
    for shape in ((1, 8, 8), (3, 32, 32)):
        pattern = drawn_pattern(shape)
        assert pattern.shape == shape
        assert float(pattern.norm()) == pytest.approx(1, abs=1e-6)
        assert (pattern == 0).any()


def test_estimators_are_measured_against_exact_traces():
    net = make_net(hidden=16).float()
    x, y = torch.randn(3, 5), torch.tensor([0, 2, 1])
    rows = compare_estimators(net, x, y, sigmas=(0.05,), draws=100, repeats=1)
    found = {(row.method, row.distribution): row for row in rows}
    assert len(found) == 11
    plain, controlled = found["taylor", "gaussian"], found["taylor-cv", "gaussian"]
    assert controlled.variance < plain.variance / 5
    for row in rows:
        assert row.milliseconds > 0
        # six standard errors of the mean over draws
        assert abs(row.bias) < 6 * (row.variance / 100) ** 0.5 + 0.01


# ---- figures


def test_figures_have_the_rows_and_curves_they_were_given(tmp_path: Path):
    pytest.importorskip("matplotlib")
    rows = {
        "grey": torch.rand(3, 1, 4, 4),
        "signed": torch.randn(2, 4, 4),
        "rgb": torch.rand(3, 3, 4, 4),
    }
    figure = plots.image_rows(rows, titles=["a", "b"], signed=["signed"])
    assert len(figure.axes) == 9
    assert sum(len(axis.images) for axis in figure.axes) == 8
    assert figure.axes[0].get_title() == "a"
    flat = plots.image_rows({"zero": torch.zeros(1, 4, 4)}, signed=["zero"])
    flat.savefig(tmp_path / "x.png")
    drawn = plots.curves({"a": ([1, 2], [3, 4])}, x_label="x", y_label="y", log_x=True)
    assert drawn.axes[0].get_xscale() == "log"
    assert drawn.axes[0].lines[0].get_ydata().tolist() == [3, 4]
    with pytest.raises(ValueError, match="rows is empty"):
        plots.image_rows({})
