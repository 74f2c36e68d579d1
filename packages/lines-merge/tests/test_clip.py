"""The CLIP recipe without a network: tables, loaders and comparison on small files."""

from __future__ import annotations

import hashlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import State
from torch import nn

import lines_merge as lm
from lines_merge.recipes import clip


def test_suites_are_the_papers() -> None:
    assert clip.suite(8) == [
        "EuroSAT",
        "DTD",
        "SUN397",
        "MNIST",
        "RESISC45",
        "GTSRB",
        "Cars",
        "SVHN",
    ]
    assert clip.suite(14)[8:] == [
        "STL10",
        "OxfordIIITPet",
        "Flowers102",
        "CIFAR100",
        "PCAM",
        "FER2013",
    ]
    assert clip.suite(20)[14:] == [
        "CIFAR10",
        "Food101",
        "FashionMNIST",
        "RenderedSST2",
        "EMNIST",
        "KMNIST",
    ]
    assert clip.TASKS["Flowers102"].epochs == 147
    with pytest.raises(ValueError, match="8, 14 or 20 tasks, got 9"):
        clip.suite(9)


def test_downloads_are_checked_and_cached(tmp_path: Path, capsys: Any) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "file.pt").write_bytes(content)
    url = (tmp_path / "file.pt").as_uri()
    digest = hashlib.sha256(content).hexdigest()
    target = clip.download(url, digest, tmp_path / "cache")
    assert target.read_bytes() == content
    assert f"downloading {url}" in capsys.readouterr().err
    (tmp_path / "file.pt").unlink()
    assert clip.download(url, digest, tmp_path / "cache") == target  # from the cache
    assert capsys.readouterr().err == ""
    (tmp_path / "file.pt").write_bytes(b"other")
    with pytest.raises(lm.CheckpointError, match=r"SHA-256 is .* expected"):
        clip.download(url, "0" * 64, tmp_path / "cache2", quiet=True)
    assert list((tmp_path / "cache2").iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_CACHE_HOME", ()),
        ("darwin", "HOME", ("Library", "Caches")),
        ("win32", "LOCALAPPDATA", ()),
    ],
)
def test_cache_folder_is_the_platforms(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    platform: str,
    variable: str,
    tail: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert clip.cache_folder() == Path(tmp_path, *tail, "lines_merge")


def test_weights_are_read_as_weights_only(tmp_path: Path, base: State) -> None:
    torch.save(base, tmp_path / "a.pt")
    assert all(
        torch.equal(value, base[name])
        for name, value in clip.load_weights(tmp_path / "a.pt").items()
    )
    torch.save(nn.Linear(2, 2), tmp_path / "b.pt")
    with pytest.raises(lm.CheckpointError, match="refused"):
        clip.load_weights(tmp_path / "b.pt")


def save_head(path: Path, name: str) -> torch.Tensor:
    """Pickle a head as the published ones were, by a class in a module that is not there to load it."""
    module, _, cls = name.rpartition(".")
    home = types.ModuleType(module)
    head_class = type(cls, (nn.Linear,), {"__module__": module})
    setattr(home, cls, head_class)
    parents = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    try:
        for parent in parents:
            sys.modules.setdefault(parent, types.ModuleType(parent))
        sys.modules[module] = home
        head = head_class(3, 2)
        torch.save(head, path)
        return head.weight.detach().clone()
    finally:
        for parent in parents:
            sys.modules.pop(parent, None)


needs_safe_globals = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="safe globals under another name came with torch 2.6"
)


@needs_safe_globals
def test_heads_are_read_through_an_allow_list(tmp_path: Path) -> None:
    weight = save_head(tmp_path / "head.pt", "src.modeling.ClassificationHead")
    head = clip.load_head(tmp_path / "head.pt")
    assert torch.equal(head.weight, weight)
    x = torch.randn(4, 3)
    expected = nn.functional.normalize(x, dim=-1) @ weight.T + head.bias
    torch.testing.assert_close(head(x), expected)
    save_head(tmp_path / "evil.pt", "src.modeling.SomethingElse")
    with pytest.raises(lm.CheckpointError, match="refused"):
        clip.load_head(tmp_path / "evil.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    with pytest.raises(lm.CheckpointError, match="holds OrderedDict, not a classification head"):
        clip.load_head(tmp_path / "state.pt")


def test_validation_images_are_carved_out_of_training_images() -> None:
    parts = clip.carve(list(range(1000)), 0.1, seed=3)
    train, validation = set(parts["train"]), set(parts["validation"])
    assert (len(train), len(validation)) == (900, 100)
    assert train | validation == set(range(1000))
    assert set(clip.carve(list(range(1000)), 0.1, seed=3)["validation"]) == validation
    assert len(clip.carve(range(100_000), 0.1, seed=0)["validation"]) == 5000


def test_images_come_from_torchvision_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def factory(name: str) -> Any:
        def build(root: Path, **arguments: Any) -> list[int]:
            calls.append((name, root.name, arguments))
            return list(range(50))

        return build

    datasets = types.SimpleNamespace(MNIST=factory("MNIST"), ImageFolder=factory("ImageFolder"))
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))
    parts = clip.load_images("MNIST", tmp_path, transform=float)
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (45, 5, 50)
    assert calls == [
        ("MNIST", "MNIST", {"download": True, "transform": float, "train": train})
        for train in (True, False)
    ]
    with pytest.raises(FileNotFoundError, match="put the train images of SUN397 into"):
        clip.load_images("SUN397", tmp_path, transform=float)
    for part in ("train", "test"):
        (tmp_path / "SUN397" / part).mkdir(parents=True)
    assert len(clip.load_images("SUN397", tmp_path, transform=float)["test"]) == 50
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"lines-merge\[data\]"):
        clip.load_images("MNIST", tmp_path, transform=float)


def test_checkpoints_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repository: str, *, allow_patterns: str, cache_dir: Path) -> str:
        return f"{cache_dir}/{repository}/{allow_patterns}"

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot)
    )
    assert clip.fetch_checkpoints("ViT-B-32", tmp_path) == tmp_path / "nik-dim/tall_masks/*32*"
    with pytest.raises(ValueError, match="model must be one of ViT-B-32"):
        clip.fetch_checkpoints("ViT-H", tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"lines-merge\[hf\]"):
        clip.fetch_checkpoints()


def test_comparison_tunes_on_validation_and_reports_test(base: State, models: list[State]) -> None:
    tasks = dict(zip(["a", "b", "c"], models, strict=True))
    parts: list[str] = []

    def score(weights: State, task: str, part: str) -> float:
        parts.append(part)
        wanted = lm.merge(base, tasks, alpha=0.4, lines=False)
        return -float((weights["pos"] - wanted["pos"]).abs().sum()) + (part == "test")

    result = clip.compare(base, tasks, score, grid=[0.2, 0.4, 0.6])
    assert result["task arithmetic"] == {"coefficient": 0.4, "accuracy": pytest.approx(1.0)}
    assert result["+ LiNeS"]["coefficient"] == 0.2  # outside the blocks beta changes nothing
    assert parts.count("test") == 6
    assert parts.count("validation") == 18


def test_heads_are_not_read_where_that_is_not_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_head(tmp_path / "head.pt", "src.modeling.ClassificationHead")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    with pytest.raises(lm.CheckpointError, match=r"torch 2\.6 and newer"):
        clip.load_head(tmp_path / "head.pt")


@needs_safe_globals
def test_the_whole_recipe_on_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(1, 1)) for _ in range(2))

    encoder = Encoder()
    images = [(torch.randn(3), i % 2) for i in range(40)]
    names = clip.suite(8)
    for name in names:
        (tmp_path / f"{name}Val").mkdir()
        tuned = {
            f"model.{k}": v + 0.01 * torch.randn_like(v) for k, v in encoder.state_dict().items()
        }
        torch.save(tuned, tmp_path / f"{name}Val" / "nonlinear_finetuned.pt")
        save_head(tmp_path / f"head_{name}Val.pt", "src.heads.ClassificationHead")
    zero_shot = {f"model.{k}": v for k, v in encoder.state_dict().items()}
    torch.save(zero_shot, tmp_path / f"{names[0]}Val" / "nonlinear_zeroshot.pt")
    open_clip = types.SimpleNamespace(create_model_and_transforms=lambda *a: (encoder, None, None))
    monkeypatch.setitem(sys.modules, "open_clip", open_clip)
    monkeypatch.setattr(clip, "fetch_checkpoints", lambda *a: tmp_path)
    monkeypatch.setattr(
        clip, "load_images", lambda *a: dict.fromkeys(["validation", "test"], images)
    )
    status = clip.main(["--data-dir", str(tmp_path), "--device", "cpu"])
    output = capsys.readouterr().out
    assert "task arithmetic" in output
    assert "+ LiNeS" in output
    gain = float(output.split("gain ")[1].split()[0])
    assert status == (0 if 3.5 <= gain <= 5.5 else 1)
    clip.main(["--data-dir", str(tmp_path), "--device", "cpu", "--json"])
    assert '"gain"' in capsys.readouterr().out
    (tmp_path / f"head_{names[3]}Val.pt").unlink()
    with pytest.raises(lm.CheckpointError, match="no head_MNIST"):
        clip.main(["--data-dir", str(tmp_path), "--device", "cpu"])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"lines-merge\[data\]"):
        clip.main(["--data-dir", str(tmp_path)])
