"""The paper's CLIP experiment on its own checkpoints: 8, 14 or 20 vision tasks. Needs a network and images.

    python -m lines_merge.recipes.clip --data-dir DATA --tasks 8

Published checkpoints of the fine-tuned image encoders, merged with and without LiNeS; both coefficients are
chosen on validation images carved out of the training splits. Nothing is downloaded on import.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError
from ..lines import merge
from ..sources import open_source
from ..tune import BETA_GRID, tune

REPOSITORY = "nik-dim/tall_masks"
MODELS = ("ViT-B-32", "ViT-B-16", "ViT-L-14")


@dataclass(frozen=True)
class Task:
    """A vision task: how long the paper fine-tunes on it, and where its images come from.

    Attributes:
        epochs: of fine-tuning (AdamW 1e-5, weight decay 0.1, 500 warm-up steps, cosine, batch 128).
        torchvision: name of the class in `torchvision.datasets`; None reads folders of images by class
            from `<data_dir>/<task>/{train,test}`.
        train: keyword arguments of the training split.
        test: keyword arguments of the test split.
    """

    epochs: int
    torchvision: str | None
    train: Mapping[str, Any]
    test: Mapping[str, Any]


def _split(train: str = "train", test: str = "test", **more: Any) -> dict[str, Any]:
    return {"train": {"split": train, **more}, "test": {"split": test, **more}}


_FLAG: dict[str, Any] = {"train": {"train": True}, "test": {"train": False}}

TASKS: Mapping[str, Task] = {
    "EuroSAT": Task(12, None, {}, {}),  # torchvision has no split of it
    "DTD": Task(76, "DTD", **_split()),
    "SUN397": Task(14, None, {}, {}),
    "MNIST": Task(5, "MNIST", **_FLAG),
    "RESISC45": Task(15, None, {}, {}),
    "GTSRB": Task(11, "GTSRB", **_split()),
    "Cars": Task(35, "StanfordCars", **_split()),
    "SVHN": Task(4, "SVHN", **_split()),
    "STL10": Task(60, "STL10", **_split()),
    "OxfordIIITPet": Task(82, "OxfordIIITPet", **_split("trainval")),
    "Flowers102": Task(147, "Flowers102", **_split()),
    "CIFAR100": Task(6, "CIFAR100", **_FLAG),
    "PCAM": Task(1, "PCAM", **_split()),
    "FER2013": Task(10, None, {}, {}),
    "CIFAR10": Task(6, "CIFAR10", **_FLAG),
    "Food101": Task(4, "Food101", **_split()),
    "FashionMNIST": Task(5, "FashionMNIST", **_FLAG),
    "RenderedSST2": Task(39, "RenderedSST2", **_split()),
    "EMNIST": Task(
        2, "EMNIST", {"train": True, "split": "digits"}, {"train": False, "split": "digits"}
    ),
    "KMNIST": Task(5, "KMNIST", **_FLAG),
}
"""The paper's order: the first 8, 14 or all 20 are its suites."""

# The class names under which the published heads were pickled.
_HEAD_CLASSES = (
    "src.modeling.ClassificationHead",
    "src.models.modeling.ClassificationHead",
    "src.heads.ClassificationHead",
)


def suite(size: int) -> list[str]:
    """Return the names of the first 8, 14 or 20 tasks.

    Raises:
        ValueError: another size.
    """
    if size not in {8, 14, 20}:
        raise ValueError(f"the suites have 8, 14 or 20 tasks, got {size!r}")
    return list(TASKS)[:size]


def cache_folder() -> Path:
    """Return the platform's cache folder for this package."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "lines_merge"


def download(
    url: str, sha256: str, data_dir: str | os.PathLike[str] | None = None, *, quiet: bool = False
) -> Path:
    """Fetch a file once, check its SHA-256, and return where it is.

    Args:
        url: address of the file.
        sha256: expected hexadecimal digest.
        data_dir: folder of the file (default: the platform's cache folder).
        quiet: do not say on stderr what is downloaded.

    Raises:
        CheckpointError: the content has another digest; nothing is kept.
    """
    folder = Path(data_dir) if data_dir is not None else cache_folder()
    target = folder / url.rpartition("/")[2]
    if target.exists() and _digest(target) == sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    if not quiet:
        print(f"downloading {url} to {target}", file=sys.stderr)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        with urllib.request.urlopen(url) as source, partial.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
        if (found := _digest(partial)) != sha256:
            raise CheckpointError(f"{url}: SHA-256 is {found}, expected {sha256}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_checkpoints(
    model: str = "ViT-B-32", data_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Download the published checkpoints of one encoder (the hub verifies its own checksums).

    Raises:
        ValueError: unknown encoder.
        ImportError: huggingface_hub is missing.
    """
    if model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError('the checkpoints need pip install "lines-merge[hf]"') from error
    pattern = f"*{model.rpartition('-')[2]}*"
    return Path(
        snapshot_download(
            REPOSITORY,
            allow_patterns=pattern,
            cache_dir=None if data_dir is None else Path(data_dir),
        )
    )


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a checkpoint's tensors; pickles are only ever read as weights.

    Raises:
        CheckpointError: the file holds anything else.
    """
    source = open_source(path)
    try:
        return {
            name: source.read(name, 0, info.numel).view(info.shape).clone()
            for name, info in source.tensors.items()
        }
    finally:
        source.close()


class ClassificationHead(nn.Linear):
    """Normalises the features, then applies the zero-shot text embeddings as a linear layer."""

    def forward(self, features: Tensor) -> Tensor:
        """Map image features (batch, width) to logits (batch, classes)."""
        return super().forward(F.normalize(features, dim=-1))


def load_head(path: str | os.PathLike[str]) -> ClassificationHead:
    """Read a published head, a pickled module, through an allow-list of its one class.

    Raises:
        CheckpointError: the pickle names any other class.
    """
    if torch.__version__ < "2.6":
        raise CheckpointError(f"{path}: a pickled head is read safely by torch 2.6 and newer only")
    allowed = [(ClassificationHead, name) for name in _HEAD_CLASSES]
    plain = [nn.Linear, ClassificationHead]
    try:
        with torch.serialization.safe_globals([*allowed, *plain]):
            head = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: refused: {str(error).splitlines()[0]}") from error
    if not isinstance(head, ClassificationHead):
        raise CheckpointError(f"{path}: holds {type(head).__name__}, not a classification head")
    return head


def load_images(
    task: str,
    data_dir: str | os.PathLike[str],
    transform: Callable[[Any], Tensor],
    *,
    validation: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the data sets "train", "validation" and "test" of a task.

    Args:
        task: a key of `TASKS`.
        data_dir: folder of the data sets; torchvision downloads what it can and checks its MD5s.
        transform: the encoder's preprocessing.
        validation: share of the training images (at most 5,000) that is set aside.
        seed: of that choice.

    Raises:
        KeyError: unknown task.
        FileNotFoundError: images that have to be put into `data_dir` by hand are not there.
        ImportError: torchvision is missing.
    """
    entry = TASKS[task]
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError('the images need pip install "lines-merge[data]"') from error
    folder = Path(data_dir) / task
    if entry.torchvision is None:
        for part in ("train", "test"):
            if not (folder / part).is_dir():
                raise FileNotFoundError(
                    f"put the {part} images of {task} into {folder / part}/<class>/"
                )
        train = datasets.ImageFolder(folder / "train", transform=transform)
        test = datasets.ImageFolder(folder / "test", transform=transform)
    else:
        build = getattr(datasets, entry.torchvision)
        train, test = (
            build(folder, download=True, transform=transform, **part)
            for part in (entry.train, entry.test)
        )
    return {**carve(train, validation, seed), "test": test}


def carve(train: Any, validation: float, seed: int) -> dict[str, Any]:
    """Split a data set into "train" and "validation" (a share, at most 5,000), by a seeded shuffle."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(int(len(train) * validation), 5000)
    subset = torch.utils.data.Subset
    return {"train": subset(train, order[count:]), "validation": subset(train, order[:count])}


@torch.no_grad()
def accuracy(
    encoder: nn.Module, head: nn.Module, images: Any, *, device: str = "cpu", batch: int = 256
) -> float:
    """Return the accuracy of encoder and head on a data set, in [0, 1]."""
    encoder.to(device).eval()
    head.to(device)
    hits = 0
    for x, y in torch.utils.data.DataLoader(images, batch_size=batch):
        hits += int((head(encoder(x.to(device))).argmax(1).cpu() == y).sum())
    return hits / len(images)


def compare(
    base: Mapping[str, Tensor],
    models: Mapping[str, Mapping[str, Tensor]],
    score: Callable[[dict[str, Tensor], str, str], float],
    *,
    grid: Iterable[float] = BETA_GRID,
) -> dict[str, dict[str, float]]:
    """Tune task arithmetic with and without LiNeS on validation data, and test both.

    Args:
        base: pre-trained encoder.
        models: fine-tuned encoders by task.
        score: called with (weights, task, "validation" or "test"), returns an accuracy.
        grid: values of beta, and of the constant factor without LiNeS.

    Returns:
        For "task arithmetic" and "+ LiNeS": the coefficient and the mean test accuracy.
    """
    points: Sequence[float] = list(grid)
    tasks = list(models)

    def mean(weights: dict[str, Tensor], part: str) -> float:
        return sum(score(weights, task, part) for task in tasks) / len(tasks)

    def merged(beta: float, lines: bool) -> dict[str, Tensor]:
        if lines:
            return merge(base, models, beta=beta)
        return merge(base, models, alpha=beta, lines=False)

    result = {}
    for label, lines in (("task arithmetic", False), ("+ LiNeS", True)):
        best = tune(
            lambda beta, lines=lines: merged(beta, lines),  # type: ignore[misc]
            lambda weights: mean(weights, "validation"),
            points,
        ).best
        result[label] = {"coefficient": best, "accuracy": mean(merged(best, lines), "test")}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; exit status 1 if the gain on eight tasks is outside [3.5, 5.5] points."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--tasks", type=int, choices=[8, 14, 20], default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('the encoder needs pip install "lines-merge[data]"') from error
    folder = fetch_checkpoints(arguments.model, arguments.data_dir)
    clip, _, transform = open_clip.create_model_and_transforms(arguments.model, "openai")
    models, heads, images = {}, {}, {}
    for task in suite(arguments.tasks):
        models[task] = load_weights(_one(folder, f"*{task}*/nonlinear_finetuned.pt"))
        heads[task] = load_head(_one(folder, f"head_{task}*.pt"))
        images[task] = load_images(task, arguments.data_dir, transform)
    base = load_weights(_one(folder, "*/nonlinear_zeroshot.pt"))

    def score(weights: dict[str, Tensor], task: str, part: str) -> float:
        plain = {name.removeprefix("model."): value for name, value in weights.items()}
        clip.load_state_dict(plain, strict=False)
        return accuracy(clip.visual, heads[task], images[task][part], device=arguments.device)

    result = compare(base, models, score)
    gain = 100 * (result["+ LiNeS"]["accuracy"] - result["task arithmetic"]["accuracy"])
    if arguments.json:
        print(json.dumps({**result, "gain": gain}))
    else:
        for label, row in result.items():
            print(f"{label:16} {row['coefficient']:4.1f} {100 * row['accuracy']:6.2f} %")
        print(f"gain {gain:+.2f} points (published: +4.5 for ViT-B/32 on 8 tasks)")
    in_range = arguments.tasks != 8 or arguments.model != MODELS[0] or 3.5 <= gain <= 5.5
    return 0 if in_range else 1


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise CheckpointError(f"{folder}: no {pattern}")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
