"""Scenarios and loaders."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sequel
from sequel import scenarios as S
from sequel.data import cifar, download
from sequel.data import idx as mnist
from sequel.testing import tiny_data


@given(st.integers(2, 12), st.integers(0, 100), st.data())
@settings(max_examples=40, deadline=None)
def test_class_splits_partition_samples_and_classes(n: int, seed: int, data: Any) -> None:
    parts, left = [], n
    while left:
        parts.append(data.draw(st.integers(1, left)))
        left -= parts[-1]
    y = np.concatenate([np.arange(n), np.random.default_rng(seed).integers(0, n, 30)])
    x = np.arange(len(y), dtype=float)[:, None]
    scenario = S.class_incremental((x, y, x, y), increments=parts, seed=seed)
    seen = np.concatenate([t.train.x[:, 0] for t in scenario])
    assert sorted(seen.tolist()) == x[:, 0].tolist()
    classes = [c for t in scenario for c in t.classes]
    assert sorted(classes) == list(range(n))
    for task in scenario:
        assert set(task.train.y.tolist()) == set(task.classes)


def test_permutations_are_bijections_and_rotation_by_360_is_the_identity() -> None:
    x, y, xt, yt = tiny_data()
    scenario = S.permuted((x, y, xt, yt), 4, seed=1)
    for task in scenario:
        assert np.allclose(
            np.sort(task.train.x.reshape(len(x), -1)), np.sort(x.reshape(len(x), -1))
        )
    assert not np.allclose(scenario[1].train.x, scenario[2].train.x)
    assert S.rotate(x, 360.0) is x
    turned = x
    for _ in range(4):
        turned = S.rotate(turned, 90.0)
    np.testing.assert_allclose(turned, x, atol=1e-12)
    np.testing.assert_allclose(S.rotate(x, 90.0), np.rot90(x, 1, axes=(2, 3)), atol=1e-12)
    assert S.rotate((x * 10).astype(np.uint8), 30).dtype == np.uint8
    with pytest.raises(ValueError, match="images"):
        S.rotate(np.zeros((1, 5)), 10)


def test_fingerprints_tell_scenarios_apart() -> None:
    data = tiny_data()
    prints = {
        S.permuted(data, 3, seed=0).fingerprint(),
        S.permuted(data, 3, seed=1).fingerprint(),
        S.permuted(data, 4, seed=0).fingerprint(),
        S.rotated(data, 3).fingerprint(),
        S.class_incremental(data, 3).fingerprint(),
        S.task_incremental(data, 3).fingerprint(),
        S.domain_incremental(data, 3).fingerprint(),
        S.class_incremental(data, 3, seed=5).fingerprint(),
    }
    assert len(prints) == 8
    assert S.permuted(data, 3).fingerprint() == S.permuted(data, 3).fingerprint()


def test_blurry_moves_samples_and_keeps_sizes() -> None:
    scenario = S.class_incremental(tiny_data(), 3)
    mixed = S.blurry(scenario, 0.4)
    assert [len(t.train) for t in mixed] == [len(t.train) for t in scenario]
    index = np.concatenate([t.train_index for t in mixed])
    assert len(np.unique(index)) == len(index)
    foreign = [
        np.isin(t.train.y, s.classes, invert=True).mean()
        for t, s in zip(mixed, scenario, strict=True)
    ]
    assert 0.1 < np.mean(foreign) < 0.4
    with pytest.raises(ValueError, match="fraction"):
        S.blurry(scenario, 1.5)
    with pytest.raises(ValueError, match="transforms"):
        S.blurry(S.permuted(tiny_data(), 2), 0.1)
    with pytest.raises(ValueError, match="mask"):
        S.blurry(S.task_incremental(tiny_data(), 3), 0.1)


def test_data_incremental_covers_every_sample_once() -> None:
    base = S.class_incremental(tiny_data(), 2)
    parts = S.data_incremental(base, 7)
    index = np.concatenate([t.train_index for t in parts])
    assert sorted(index.tolist()) == list(range(90))
    assert max(len(t.train) for t in parts) == 7


def test_datasets_come_in_many_forms() -> None:
    x, y, xt, yt = tiny_data()
    tensors = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    for form in (S.Dataset(x, y, xt, yt), (x, y, xt, yt), (tensors, tensors), (x, y), tensors):
        assert S.Dataset.of(form).n_classes == 6
    assert len(S.Dataset.of((x, y)).x_test) == 18
    scenario = S.from_datasets([(x, y, xt, yt)] * 2, kind="task")
    assert scenario.mask is not None
    assert scenario.mask.all()
    assert "2 tasks" in repr(scenario)


def test_bad_input_is_named() -> None:
    x, y, xt, yt = tiny_data()
    data = (x, y, xt, yt)
    with pytest.raises(ValueError, match="n_tasks=4 does not divide the 6 classes"):
        S.class_incremental(data, 4)
    with pytest.raises(ValueError, match="class_order must be a permutation"):
        S.class_incremental(data, 2, class_order=[0, 1, 2, 3, 4, 4])
    with pytest.raises(ValueError, match="increments"):
        S.class_incremental(data, increments=[1, 2])
    with pytest.raises(ValueError, match="n_tasks or increments"):
        S.class_incremental(data)
    with pytest.raises(ValueError, match="equal"):
        S.domain_incremental(data, increments=[2, 4])
    with pytest.raises(ValueError, match="y_train must lie in"):
        S.class_incremental((x, y - 1, xt, yt), 2)
    with pytest.raises(TypeError, match="y_train must be integer labels, got dtype float64"):
        S.class_incremental((x, y.astype(float), xt, yt), 2)
    with pytest.raises(ValueError, match="one label per sample"):
        S.class_incremental((x, np.zeros((90, 2), int), xt, yt), 2)
    with pytest.raises(ValueError, match="differ in length: 80 and 90"):
        S.class_incremental((x[:80], y, xt, yt), 2)
    with pytest.raises(ValueError, match="differ in length"):
        S.Dataset.of((x[:80], y))
    with pytest.raises(ValueError, match="differ in length"):
        S.Data(x, y[:3], y)
    with pytest.raises(ValueError, match="empty test set"):
        S.class_incremental((x, y, xt[yt > 2], yt[yt > 2]), 2)
    with pytest.raises(ValueError, match="empty train set"):
        S.class_incremental((x[y > 2], y[y > 2], xt, yt), 2)
    with pytest.raises(ValueError, match="at least one"):
        S.from_datasets([])
    with pytest.raises(ValueError, match="at least one task"):
        S.Scenario([], 2, "class")


# --------------------------------------------------------------------- loaders
def idx(a: np.ndarray[Any, Any]) -> bytes:
    head = bytes([0, 0, 8, a.ndim]) + np.array(a.shape, ">i4").tobytes()
    return head + a.astype(np.uint8).tobytes()


def fill_mnist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = np.arange(10 * 4 * 4).reshape(10, 4, 4) % 255, np.arange(10) % 10
    sums = []
    (folder / "mnist").mkdir()
    for i, file in enumerate(mnist.FILES):
        packed = gzip.compress(idx(labels if i % 2 else images))
        (folder / "mnist" / f"{file}.gz").write_bytes(packed)
        sums.append(hashlib.md5(packed).hexdigest())
    monkeypatch.setitem(mnist.SOURCES, "mnist", ("https://example.invalid/", tuple(sums)))


def test_mnist_files_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_mnist(tmp_path, monkeypatch)
    data = sequel.data.mnist(tmp_path)
    assert data.x_train.shape == (10, 1, 4, 4)
    assert data.x_train.dtype == np.uint8
    assert data.y_test.tolist() == list(range(10))
    scenario = S.permuted(data, 2)
    model = sequel.nn.MLP(16, (8,), 10)
    learner = sequel.Learner(model, torch.optim.SGD(model.parameters(), 0.1), sequel.Naive())
    learner.setup(scenario)
    seen = learner.backend.model.prepare(torch.tensor(data.x_train[:1]))
    expected = (data.x_train[:1] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-5)
    half = sequel.data.mnist_test(tmp_path, checksum=False)
    assert (len(half.y_train), len(half.y_test)) == (8, 2)
    with pytest.raises(OSError, match="md5 differs"):
        sequel.data.mnist_test(tmp_path)
    with pytest.raises(OSError, match="no t10k"):
        sequel.data.mnist_test(tmp_path / "nowhere")
    (tmp_path / "mnist" / f"{mnist.FILES[0]}.gz").write_bytes(b"damaged")
    with pytest.raises(OSError, match="the file was removed"):
        sequel.data.mnist(tmp_path)
    assert not (tmp_path / "mnist" / f"{mnist.FILES[0]}.gz").exists()

    def offline(request: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in ("fashion", "kmnist"):
        monkeypatch.setitem(mnist.SOURCES, name, mnist.SOURCES["mnist"])
        (tmp_path / name).mkdir()
        with pytest.raises(OSError, match="no network"):
            getattr(sequel.data, name)(tmp_path)


def test_idx_files_are_checked() -> None:
    with pytest.raises(ValueError, match="not an IDX"):
        mnist.read_idx(b"PK")
    with pytest.raises(ValueError, match="cut off"):
        mnist.read_idx(idx(np.zeros((3, 3)))[:-1])


def test_download_resumes_and_replaces_atomically(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"0123456789")
    good = hashlib.md5(b"0123456789").hexdigest()
    target = tmp_path / "to" / "file.bin"
    assert download.fetch(source.as_uri(), target, good).read_bytes() == b"0123456789"
    target.unlink()
    (tmp_path / "to" / "file.bin.part").write_bytes(b"01234")  # a server without ranges: start anew
    assert download.fetch(source.as_uri(), target, good, quiet=True).read_bytes() == b"0123456789"
    with pytest.raises(OSError, match="expected 00"):
        download.fetch(source.as_uri(), tmp_path / "other", "00")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "other.part").exists()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_dir().name == "sequel"
    assert download.cache_dir(tmp_path) == tmp_path


def tar(path: Path, members: dict[str, Any]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, value in members.items():
            data = pickle.dumps(value)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return download.md5(path)


def test_cifar_archives_are_read_without_running_them(tmp_path: Path) -> None:
    def batch(n: int, key: bytes) -> dict[bytes, Any]:
        return {b"data": np.full((n, 3072), n, dtype=np.uint8), key: list(range(n))}

    root = "cifar-10-batches-py"
    members = {f"{root}/data_batch_{i}": batch(2, b"labels") for i in range(1, 6)}
    members[f"{root}/test_batch"] = batch(3, b"labels")
    checksum = tar(tmp_path / "cifar-10-python.tar.gz", members)
    data = sequel.data.cifar10(tmp_path, md5=checksum)
    assert data.x_train.shape == (10, 3, 32, 32)
    assert data.y_test.tolist() == [0, 1, 2]
    parts = {f"cifar-100-python/{p}": batch(4, b"fine_labels") for p in ("train", "test")}
    checksum = tar(tmp_path / "cifar-100-python.tar.gz", parts)
    assert sequel.data.cifar100(tmp_path, md5=checksum).x_test.shape == (4, 3, 32, 32)
    with pytest.raises(pickle.UnpicklingError, match="is not a NumPy array"):
        cifar.safe_unpickle(pickle.dumps(Path("x")))


def test_tiny_imagenet_archive(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")

    def jpeg(value: int) -> bytes:
        out = io.BytesIO()
        image.new("L", (64, 64), value).save(out, "JPEG")
        return out.getvalue()

    file = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(file, "w") as archive:
        root = "tiny-imagenet-200"
        archive.writestr(f"{root}/wnids.txt", "n02\nn01\n")
        for name in ("n01", "n02"):
            archive.writestr(f"{root}/train/{name}/images/{name}_0.JPEG", jpeg(50))
        archive.writestr(f"{root}/val/val_annotations.txt", "val_0.JPEG\tn01\t0\t0\t1\t1\n")
        archive.writestr(f"{root}/val/images/val_0.JPEG", jpeg(200))
    data = sequel.data.tiny_imagenet(tmp_path, md5=download.md5(file))
    assert data.x_train.shape == (2, 3, 64, 64)
    assert data.y_train.tolist() == [1, 0]
    assert data.y_test.tolist() == [1]
