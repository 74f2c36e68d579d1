"""Judge a saved run: its live, averaged and slow generators, and FID with the library torch-fidelity."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lookahead_minmax import EMA, LookaheadMinmax
from lookahead_minmax.gan.checkpoint import read
from lookahead_minmax.gan.data import RING_DEVIATION, ring_centres
from lookahead_minmax.gan.train import NETWORKS, Recipe, make_optimizer
from lookahead_minmax.metrics import feature_distance, mode_coverage

__all__ = ["Run", "feature_distance", "inception", "load_run", "ring_coverage"]


@dataclass(frozen=True)
class Run:
    """What `gan --out` or `train(checkpoint=...)` saved.

    Attributes:
        recipe: the run's settings.
        rounds: how many are done.
        generators: "live" and "ema"; with lookahead also "slow" and "ema_slow".
    """

    recipe: Recipe
    rounds: int
    generators: dict[str, nn.Module]

    @torch.no_grad()
    def sample(self, which: str, count: int, seed: int = 0) -> Tensor:
        """Return images of one of the generators, in evaluation mode.

        Args:
            which: a key of `generators`.
            count: how many, at least 2.
            seed: of the noise, the same for every generator.

        Raises:
            ValueError: `count` is below 2.
        """
        if count < 2:
            raise ValueError(f"samples must be at least 2, got {count}")
        _, shape = NETWORKS[self.recipe.data]
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
        generator = self.generators[which].eval()
        return torch.cat([generator(part) for part in torch.split(noise, 500)])


def load_run(folder: Path) -> Run:
    """Read the run that was saved in a folder.

    Raises:
        FileNotFoundError: there is no `checkpoint.pt` in it.
        ValueError: the file is no checkpoint of a run.
    """
    state = read(Path(folder) / "checkpoint.pt")
    recipe, parts = Recipe(**state["recipe"]), state["parts"]
    generator, discriminator = NETWORKS[recipe.data][0]()
    generator.load_state_dict(parts["G"])
    generators = {"live": generator}
    for name in ("ema", "ema_slow") if recipe.k else ("ema",):
        average = EMA(generator, recipe.ema)
        average.load_state_dict(parts[name])
        generators[name] = average.averaged_module()
    if recipe.k:
        networks = {"G": generator, "D": discriminator}
        players = {name: make_optimizer(recipe, network) for name, network in networks.items()}
        lookahead = LookaheadMinmax(players, k=list(recipe.k), alpha=recipe.alpha)
        lookahead.load_state_dict(parts["lookahead"])
        generators["slow"] = copy.deepcopy(generator)
        generators["slow"].load_state_dict(lookahead.slow_state_dict(generator))
    return Run(recipe, state["numbers"]["rounds"][-1], generators)


def ring_coverage(points: Tensor) -> dict[str, float]:
    """Return how many of the ring's eight modes have a point within three deviations, and how many points do."""
    coverage = mode_coverage(points, ring_centres(), 3 * RING_DEVIATION)
    return {"modes": coverage.modes, "quality": coverage.quality}


class _Images(Dataset[Tensor]):
    """Images as torch-fidelity takes them: (3, height, width), uint8."""

    def __init__(self, images: Tensor, scale: Literal["-1_1", "0_1"]) -> None:
        if images.ndim == 2:  # the digits
            side = int(images.shape[1] ** 0.5)
            images = images.view(-1, 1, side, side)
        unit = (images + 1) / 2 if scale == "-1_1" else images
        rounded = (unit.clamp(0, 1) * 255).round().to(torch.uint8)
        self.images = rounded.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def inception(
    real: Tensor,
    made: Tensor,
    scale: Literal["-1_1", "0_1"] = "-1_1",
    *,
    weights: Path | None = None,
) -> dict[str, float]:
    """Return the Fréchet inception distance and the inception score of images, by torch-fidelity.

    The paper's numbers are of 50,000 samples against the statistics of the training set. Needs
    `pip install "lookahead-minmax[fid]"`. Without `weights` torch-fidelity takes those of the TTUR Inception
    from its cache, or downloads them (91 MB) and says so.

    Args:
        real: (n, channels, height, width), one or three channels, or flattened square images (n, pixels).
        made: the generator's, of the same kind.
        scale: range of the pixels; 8 bits a pixel are kept, as in an image file.
        weights: a file with torch-fidelity's Inception weights.

    Returns:
        "fid", "inception_score" and "inception_score_std" (over ten parts).

    Raises:
        ImportError: torch-fidelity is missing.
        ValueError: the data are no images, or there are fewer than ten.
        FileNotFoundError: there is no such file of weights.
    """
    for name, images in (("real", real), ("made", made)):
        square = images.ndim == 2 and int(images.shape[1] ** 0.5) ** 2 == images.shape[1]
        if not square and (images.ndim != 4 or images.shape[1] not in (1, 3)):
            raise ValueError(f"FID is of images: {name} has the shape {tuple(images.shape)}")
        if len(images) < 10:
            raise ValueError(f"FID needs at least 10 images, {name} has {len(images)}")
    if weights is not None and not weights.is_file():
        raise FileNotFoundError(f"there is no file of Inception weights at {weights}")
    try:
        import torch_fidelity
    except ImportError as error:
        raise ImportError(
            'FID is computed by torch-fidelity: pip install "lookahead-minmax[fid]"'
        ) from error
    scores = torch_fidelity.calculate_metrics(
        input1=_Images(made, scale),
        input2=_Images(real, scale),
        fid=True,
        isc=True,
        cuda=torch.cuda.is_available(),
        feature_extractor_weights_path=None if weights is None else str(weights),
        save_cpu_ram=True,  # no worker processes for images that are in memory
        cache=False,
        verbose=False,
    )
    names = {
        "fid": torch_fidelity.KEY_METRIC_FID,
        "inception_score": torch_fidelity.KEY_METRIC_ISC_MEAN,
        "inception_score_std": torch_fidelity.KEY_METRIC_ISC_STD,
    }
    return {name: float(scores[key]) for name, key in names.items()}
