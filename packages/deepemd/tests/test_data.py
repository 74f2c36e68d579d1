from __future__ import annotations

import functools
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import trimesh
from conftest import lap

from deepemd import data
from deepemd.data import download, files, sets, shards
from deepemd.data.unseen import UNSEEN, unseen_shape


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- shapes and pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(data.PRIMITIVES))
def test_primitives_are_finite_bounded_and_of_the_size_asked_for(kind: str) -> None:
    points = data.PRIMITIVES[kind](200, generator(), generator(1).random(3))
    assert points.shape == (200, 3)
    assert np.isfinite(points).all()
    assert np.abs(points).max() < 4


def test_sphere_torus_and_superquadric_satisfy_their_equations() -> None:
    p = np.array([0.5, 0.5, 0.5])
    sphere = data.PRIMITIVES["sphere"](50, generator(), p)
    np.testing.assert_allclose((sphere**2).sum(1), 1, rtol=1e-12)
    torus = data.PRIMITIVES["torus"](50, generator(), p)
    ring = np.hypot(torus[:, 0], torus[:, 1]) - 1
    np.testing.assert_allclose(np.hypot(ring, torus[:, 2]), 0.15 + 0.35 * 0.5, rtol=1e-9)
    power = 2 / (0.3 + 2 * 0.5)
    quadric = data.PRIMITIVES["superquadric"](50, generator(), p)
    np.testing.assert_allclose((np.abs(quadric) ** power).sum(1), 1, rtol=1e-9)


def test_rotations_are_rotations() -> None:
    for seed in range(20):
        q = data.random_rotation(generator(seed))
        np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(q) == pytest.approx(1)


@pytest.mark.parametrize("planar", [False, True])
def test_shapes_are_repeatable_and_flat_where_asked(planar: bool) -> None:
    for seed in range(10):
        shape = data.random_shape(generator(seed), planar=planar)
        a, b = shape.sample(64, generator(1)), shape.sample(64, generator(1))
        np.testing.assert_array_equal(a, b)
        assert (a[:, 2] == 0).all() == planar
        other = unseen_shape(generator(seed), planar=planar).sample(64, generator(2))
        assert np.isfinite(other).all()
        assert (other[:, 2] == 0).all() == planar
    assert set(UNSEEN).isdisjoint(data.PRIMITIVES)


@pytest.mark.parametrize("kind", list(data.KINDS))
@pytest.mark.parametrize("shapes", ["train", "unseen"])
def test_every_kind_of_pair_is_finite_planar_where_asked_and_of_any_sizes(
    kind: str, shapes: str
) -> None:
    for seed in range(12):
        planar = float(seed % 2)
        spec = data.PairSpec({kind: 1.0}, planar=planar, shapes=shapes)
        for n, m in ((16, None), (10, 25), (1, 1)):
            x, y, name = data.make_pair(generator(seed), n, m, spec)
            assert name == kind
            assert x.shape == (n, 3)
            assert y.shape == (m or n, 3)
            assert np.isfinite(x).all()
            assert np.isfinite(y).all()
            if planar:
                assert np.abs(np.concatenate([x, y])[:, 2]).max() < 1e-9


def test_kinds_come_as_often_as_their_weights_say() -> None:
    spec = data.PairSpec({"resample": 3.0, "other": 1.0})
    kinds = [data.make_pair(generator(seed), 4, spec=spec)[2] for seed in range(400)]
    share = kinds.count("resample") / 400
    assert abs(share - 0.75) < 0.09  # four standard deviations


def test_items_are_a_pure_function_of_seed_and_number_and_labelled_exactly() -> None:
    first, second = (data.PairDataset(None, 20, seed=4) for _ in range(2))
    for i in (0, 7, 3):
        a, b = first[i], second[i]
        assert all(a[key].equal(b[key]) for key in a)
        both = torch.cat([a["x"], a["y"]])
        assert float(both.norm(dim=1).max()) == pytest.approx(1, abs=1e-6)
        assert float(both.mean(0).abs().max()) < 1e-6
        assert float(a["distance"]) == pytest.approx(lap(a["x"][None], a["y"][None])[0], rel=1e-6)
    assert not first[0]["x"].equal(data.PairDataset(None, 20, seed=5)[0]["x"])
    with pytest.raises(IndexError, match="item 9"):
        data.PairDataset(None, 4, size=9)[9]
    with pytest.raises(IndexError):
        first.pair(-1)
    assert len(first) == 1 << 20


def test_unknown_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown kinds"):
        data.PairSpec({"cube": 1.0})
    with pytest.raises(ValueError, match="positive sum"):
        data.PairSpec({"other": 0.0})
    with pytest.raises(ValueError, match="shapes must be"):
        data.PairSpec(shapes="x")


# --- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"half": True}, {"seeds_only": True}])
def test_shards_give_back_what_was_made(tmp_path: Path, options: dict) -> None:
    paths = shards.write_shards(tmp_path, n_points=12, pairs=5, per_shard=2, seed=3, **options)
    assert [p.name for p in paths] == [f"shard-0000{k}.safetensors" for k in range(3)]
    expected = data.PairDataset(None, 12, 3)
    items = [item for path in paths for item in shards.read_shard(path)]
    assert len(items) == 5
    for i, item in enumerate(items):
        for key, value in expected[i].items():
            if options.get("half") and key in "xy":
                torch.testing.assert_close(item[key], value.half().float(), rtol=0, atol=0)
            else:
                assert item[key].equal(value), key
    assert sum(shards.verify_shard(path) for path in paths) == 5
    assert shards.verify_shard(paths[0], every=2) == 1


def test_a_finished_shard_is_kept_and_a_wrong_one_found(tmp_path: Path) -> None:
    (path,) = shards.write_shards(tmp_path, n_points=6, pairs=2, seed=0)
    content = path.read_bytes()
    shards.write_shards(tmp_path, n_points=6, pairs=2, seed=1)
    assert path.read_bytes() == content
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors["distance"] = tensors["distance"] * 2
    save_file(tensors, path)
    with pytest.raises(ValueError, match="pair 0 is labelled"):
        shards.verify_shard(path)


# --- files -----------------------------------------------------------------------------------------


def test_arrays_tensors_and_text_are_read_as_points(tmp_path: Path) -> None:
    points = generator().random((10, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", points)
    np.savez(tmp_path / "a.npz", points)
    torch.save(torch.from_numpy(points), tmp_path / "a.pt")
    np.savetxt(tmp_path / "a.xyz", points, fmt="%.9g")
    for suffix in ("npy", "npz", "pt", "xyz"):
        found = files.read_points(tmp_path / f"a.{suffix}")
        torch.testing.assert_close(found.float(), torch.from_numpy(points))
    some = files.read_points(tmp_path / "a.npy", points=4)
    assert {tuple(row) for row in some.tolist()} <= {tuple(row) for row in points.tolist()}
    with pytest.raises(ValueError, match="has 10 points, 11 were asked for"):
        files.read_points(tmp_path / "a.npy", points=11)
    torch.save({"x": 1}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds a dict"):
        files.read_points(tmp_path / "b.pt")
    np.save(tmp_path / "c.npy", np.zeros(3))
    with pytest.raises(ValueError, match="not points"):
        files.read_points(tmp_path / "c.npy")
    with pytest.raises(ValueError, match="suffix must be one of"):
        files.read_points(tmp_path / "a.las")


@pytest.mark.parametrize("suffix", ["ply", "off", "obj"])
def test_meshes_are_sampled_on_their_surface(tmp_path: Path, suffix: str) -> None:
    trimesh.creation.box((2.0, 2.0, 2.0)).export(tmp_path / f"box.{suffix}")
    points = files.read_points(tmp_path / f"box.{suffix}", points=600)
    assert points.shape == (600, 3)
    torch.testing.assert_close(points.abs().amax(1), torch.ones(600).to(points), rtol=0, atol=1e-6)
    inside = (points.abs() < 0.999).sum(1)
    assert bool((inside >= 1).all())


def test_a_mesh_without_faces_is_its_points(tmp_path: Path) -> None:
    vertices = generator().random((7, 3))
    trimesh.PointCloud(vertices).export(tmp_path / "cloud.ply")
    found = files.read_points(tmp_path / "cloud.ply")
    np.testing.assert_allclose(found.numpy(), vertices, atol=1e-6)


# --- downloads -------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        content = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        start = 0
        if "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}", folder
        httpd.shutdown()
        thread.join()


def test_a_broken_download_is_resumed_verified_and_renamed(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = server
    content = generator().bytes(5000)
    (folder / "f.bin").write_bytes(content)
    path = tmp_path / "cache" / "f.bin"
    path.parent.mkdir()
    path.with_name("f.bin.part").write_bytes(content[:1234])
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    found = download.fetch((f"{url}/f.bin",), path, checksum=digest, size=5000)
    assert found.read_bytes() == content
    assert not path.with_name("f.bin.part").exists()
    assert "downloading" in capsys.readouterr().err
    assert (
        download.fetch(("http://nowhere.invalid",), path, checksum=digest, progress=False) == path
    )
    with pytest.raises(ValueError, match="has MD5"):
        download.fetch((), path, checksum="0", progress=False)
    with pytest.raises(ValueError, match="has 5000 bytes, expected 1"):
        download.fetch((), path, size=1, progress=False)


def test_a_wrong_file_is_thrown_away_and_dead_sources_are_all_named(
    server: tuple[str, Path], tmp_path: Path
) -> None:
    url, folder = server
    (folder / "f.bin").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="MD5"):
        download.fetch((f"{url}/f.bin",), tmp_path / "f.bin", checksum="0", progress=False)
    assert not (tmp_path / "f.bin").exists()
    assert not (tmp_path / "f.bin.part").exists()
    dead = ("file:///nowhere/a", "file:///nowhere/b")
    with pytest.raises(OSError, match=r"no source answered:\n.*a.*\n.*b"):
        download.fetch(dead, tmp_path / "g.bin", progress=False)


def test_cache_folder_follows_argument_variable_and_platform(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert download.cache_dir(tmp_path) == tmp_path
    monkeypatch.setenv("DEEPEMD_DATA_DIR", "somewhere")
    assert download.cache_dir() == Path("somewhere")
    monkeypatch.delenv("DEEPEMD_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    for platform, end in (("linux", "cache"), ("darwin", "Caches"), ("win32", "Local")):
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        monkeypatch.setattr(download.sys, "platform", platform)
        assert download.cache_dir().name == "deepemd"
        assert download.cache_dir().parent.name == end


# --- data sets -------------------------------------------------------------------------------------


def write_h5(path: Path, n: int = 3) -> None:
    with h5py.File(path, "w") as file:
        file["data"] = generator().random((n, 2048, 3)).astype(np.float32)
        file["label"] = np.arange(n).reshape(-1, 1)


def test_modelnet40_is_fetched_unpacked_read_and_verified(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    inner = tmp_path / "made" / "modelnet40_ply_hdf5_2048"
    inner.mkdir(parents=True)
    for name in ("ply_data_train0.h5", "ply_data_train1.h5", "ply_data_test0.h5"):
        write_h5(inner / name)
    archive = folder / "m.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in inner.iterdir():
            file.write(path, f"{inner.name}/{path.name}")
    source = sets.Source(
        (f"{url}/m.zip",), "m.zip", inner.name, md5=download.md5(archive),
        files=(("ply_data_train0.h5", download.md5(inner / "ply_data_train0.h5")),),
    )  # fmt: skip
    monkeypatch.setitem(sets.SOURCES, "modelnet40", source)
    root = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="deepemd data fetch modelnet40"):
        sets.verify_set("modelnet40", root)
    with pytest.raises(FileNotFoundError, match="ply_data_train"):
        sets.modelnet40("train", root)
    for _ in range(2):
        assert sets.fetch_set("modelnet40", root, progress=False) == root / inner.name
    points, labels = sets.modelnet40("train", root)
    assert points.shape == (6, 2048, 3)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert sets.modelnet40("test", root)[0].shape == (3, 2048, 3)
    assert sets.verify_set("modelnet40", root) == ["m.zip", "ply_data_train0.h5"]
    write_h5(root / inner.name / "ply_data_train0.h5", 1)
    with pytest.raises(ValueError, match="has MD5"):
        sets.verify_set("modelnet40", root)


def test_published_sources_are_those_of_the_specification() -> None:
    source = sets.SOURCES["modelnet40"]
    assert source.md5 == "c9ab8e6dfb16f67afdab25e155c79e59"
    assert len(source.urls) == 2
    assert sets.SOURCES["modelnet10"].size == 473_402_300
    assert sets.SOURCES["scanobjectnn"].md5 == "36876af479f9ad39abad5ebcd89038dd"


def test_terms_are_to_be_accepted_and_unknown_sets_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="terms of use"):
        sets.fetch_set("scanobjectnn", tmp_path)
    for call in (sets.fetch_set, sets.verify_set):
        with pytest.raises(KeyError, match="unknown data set 'x'"):
            call("x", tmp_path)


def test_archives_that_climb_out_or_lack_their_folder_are_refused(tmp_path: Path) -> None:
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as file:
        file.writestr("../escape.txt", "x")
    with pytest.raises(ValueError, match="refuses the path"):
        sets.unpack(evil, tmp_path / "set")
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("wrong/file.txt", "x")
    with pytest.raises(ValueError, match="does not hold the folder"):
        sets.unpack(other, tmp_path / "set")


def test_shapenet_is_fetched_by_hand_and_read_in_pointflow_s_layout(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Google Drive"):
        sets.fetch_set("shapenet", tmp_path)
    with pytest.raises(FileNotFoundError, match="Google Drive"):
        sets.verify_set("shapenet", tmp_path)
    folder = tmp_path / "ShapeNetCore.v2.PC15k" / "02691156" / "train"
    folder.mkdir(parents=True)
    cloud = generator().random((15000, 3)).astype(np.float32)
    np.save(folder / "a.npy", cloud)
    assert sets.fetch_set("shapenet", tmp_path) == tmp_path / "ShapeNetCore.v2.PC15k"
    assert len(sets.verify_set("shapenet", tmp_path)) == 1
    found = sets.shapenet("02691156", data_dir=tmp_path, n_points=100)
    np.testing.assert_array_equal(found[0].numpy(), cloud[:100])
    np.save(folder / "b.npy", cloud[:50])
    with pytest.raises(ValueError, match="shape"):
        sets.verify_set("shapenet", tmp_path)
    with pytest.raises(ValueError, match="expected at least"):
        sets.shapenet("02691156", data_dir=tmp_path, n_points=100)
    with pytest.raises(FileNotFoundError, match="Google Drive"):
        sets.shapenet("02691156", "test", tmp_path)
    with pytest.raises(ValueError, match="split must be one of"):
        sets.shapenet("02691156", "all", tmp_path)


def test_h5_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["data"] = np.zeros((2, 5))
    with pytest.raises(ValueError, match=r"lacks \['label'\]"):
        sets.read_h5(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["label"] = np.zeros(2)
    with pytest.raises(ValueError, match="are not n clouds"):
        sets.read_h5(tmp_path / "a.h5")
