"""Evaluation of a network on a frozen test set with exact labels: every metric of spec 3.2."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepemd import metrics
from deepemd.api import match
from deepemd.core.model import DeepEMD
from deepemd.core.output import matching_cost
from deepemd.data.labels import label
from deepemd.data.pairs import PairDataset, PairSpec

TEST_SEED = 20_231_109  # of the frozen sets; training seeds are small numbers


@dataclass(frozen=True)
class TestSet:
    """Pairs of one size with their exact matchings: ``x``, ``y`` (B, N, D), ``index``, ``distance``."""

    __test__ = False  # not a test class

    name: str
    x: Tensor
    y: Tensor
    index: Tensor
    distance: Tensor


def frozen_set(
    n_points: int, pairs: int = 64, *, shapes: str = "train", seed: int = TEST_SEED
) -> TestSet:
    """Return a test set; the same for everybody, as the generator and its seed are fixed.

    Args:
        n_points: N.
        pairs: how many.
        shapes: ``"train"`` for fresh pairs of the training mixture, ``"unseen"`` for shapes that no
            checkpoint was trained on.
        seed: of the set.
    """
    items = PairDataset(PairSpec(shapes=shapes), n_points, seed)
    batch = [items[i] for i in range(pairs)]
    x, y, index, distance = (
        torch.stack([item[key] for item in batch]) for key in ("x", "y", "index", "distance")
    )
    name = f"{'in distribution' if shapes == 'train' else 'unseen shapes'}, N={n_points}"
    return TestSet(name, x, y, index, distance.double())


def digits_set(n_points: int = 64, pairs: int = 64, *, seed: int = 0) -> TestSet:
    """Return pairs of different digits of scikit-learn's ``load_digits`` as planar clouds (3.3.4)."""
    from deepemd.examples.clouds import digit_clouds

    clouds, _ = digit_clouds(n_points, 2 * pairs, seed=seed)
    x, y = clouds[:pairs], clouds[pairs:]
    index, distance = label(x, y)
    return TestSet(f"digits (2-D), N={n_points}", x, y, index, distance)


def exact_gradient(test: TestSet) -> Tensor:
    """Return the gradient of the exact EMD with respect to ``x``."""
    x = test.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(matching_cost(x, test.y, test.index).sum(), x)
    return gradient


def _run(test: TestSet, batch: int, **options: Any) -> Iterator[tuple[Tensor, Tensor, Any, float]]:
    """Yield distance, gradient with respect to x, output and seconds, batch by batch."""
    for start in range(0, len(test.x), batch):
        x = test.x[start : start + batch].clone().requires_grad_()
        began = time.perf_counter()
        out = match(x, test.y[start : start + batch], **options)
        seconds = time.perf_counter() - began
        (gradient,) = torch.autograd.grad(out.distance.sum(), x)
        yield out.distance.detach(), gradient, out, seconds


def measure(test: TestSet, *, batch: int = 16, **options: Any) -> dict[str, float]:
    """Run one method on a test set and compare it with the exact answer.

    Args:
        test: the pairs.
        batch: pairs at a time.
        **options: of :func:`deepemd.match`.

    Returns:
        The entries of :func:`deepemd.metrics.distance_metrics`, ``gradient_cosine`` and
        ``gradient_cosine_rows``, ``ms_per_pair``, and where the method has them ``accuracy``,
        ``tolerant_accuracy``, ``bijectivity``, ``excess`` (of a bijection), ``dual_gap`` and ``rel_gap``.
    """
    parts = list(_run(test, batch, **options))
    distance = torch.cat([part[0] for part in parts])
    gradient = torch.cat([part[1] for part in parts])
    outs = [part[2] for part in parts]
    exact = exact_gradient(test)
    found = metrics.distance_metrics(distance, test.distance)
    found["gradient_cosine"] = float(metrics.gradient_cosine(gradient, exact).mean())
    found["gradient_cosine_rows"] = float(
        metrics.gradient_cosine(gradient, exact, rows=True).mean()
    )
    if outs[0].index is not None:
        index = torch.cat([out.index for out in outs])
        found["accuracy"] = float(metrics.accuracy(index, test.index).mean())
        found["tolerant_accuracy"] = float(
            metrics.tolerant_accuracy(index, test.index, test.y).mean()
        )
        found["bijectivity"] = float(metrics.bijectivity(index).mean())
    if outs[0].upper is not None:
        upper = torch.cat([out.upper for out in outs])
        found["excess"] = float(metrics.excess(upper, test.distance).mean())
    if outs[0].lower is not None:
        lower = torch.cat([out.lower for out in outs]).double()
        found["dual_gap"] = float((1 - lower / test.distance).mean())
    if outs[0].rel_gap is not None:
        found["rel_gap"] = float(torch.cat([out.rel_gap for out in outs]).max())
    found["ms_per_pair"] = 1e3 * sum(part[3] for part in parts) / len(test.x)
    return found


def peak_memory() -> float:
    """Return the peak memory of this process in MB (of the accelerator, where one is used)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


DECODED = ("argmax", "both", "soft", "sinkhorn", "round", "refine")


def evaluate(
    model: DeepEMD,
    sizes: Sequence[int] = (64, 256, 1024),
    *,
    pairs: int = 64,
    decoders: Sequence[str] = DECODED,
    seed: int = TEST_SEED,
    progress: bool = False,
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a network on the frozen sets: in distribution, unseen shapes, and digits if possible.

    Args:
        model: the network.
        sizes: values of N; the large ones with fewer pairs, but at least 16.
        pairs: pairs per set.
        decoders: which decoders to report.
        seed: of the sets.
        progress: print a line per set on stderr.

    Returns:
        ``{set: {decoder: {metric: value}}}``; ``"chamfer"`` and ``"nearest"`` (the one-sided nearest
        neighbour, what argmax would be without learning) stand beside the decoders.
    """
    sets = []
    for n in sizes:
        count = min(pairs, max(2**23 // n**2, 16))
        sets += [frozen_set(n, count, shapes=kind, seed=seed) for kind in ("train", "unseen")]
    if 2 in model.trained_dims:
        try:
            sets.append(digits_set(min(sizes), pairs))
        except ImportError:
            print("scikit-learn is not installed: no digits", file=sys.stderr)
    report: dict[str, dict[str, dict[str, float]]] = {}
    for test in sets:
        rows = {how: measure(test, method="deepemd", model=model, decode=how) for how in decoders}
        rows["chamfer"] = measure(test, method="chamfer", mean_of_two=True)
        for row in rows.values():
            row["peak_mb"] = peak_memory()
        report[test.name] = rows
        if progress:
            line = rows[decoders[0]]
            print(
                f"{test.name}: {decoders[0]} relative error {100 * line['rel_err']:.1f} %, gradient "
                f"cosine {line['gradient_cosine']:.3f}",
                file=sys.stderr,
            )
    return report


COLUMNS = {
    "rel_err": ("rel. err.", 100), "rel_err_median": ("median", 100), "rel_err_p95": ("p95", 100),
    "bias": ("bias", 100), "pearson": ("r", 1), "r2": ("r²", 1), "spearman": ("ρ", 1),
    "kendall": ("τ", 1), "accuracy": ("acc.", 1), "tolerant_accuracy": ("tol. acc.", 1),
    "bijectivity": ("bij.", 1), "gradient_cosine": ("grad. cos", 1),
    "gradient_cosine_rows": ("by rows", 1), "excess": ("UB excess", 100),
    "dual_gap": ("dual gap", 100), "ms_per_pair": ("ms/pair", 1), "peak_mb": ("peak MB", 1),
}  # fmt: skip


def markdown(report: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the report as one Markdown table per set."""
    lines: list[str] = []
    for name, rows in report.items():
        lines += [f"### {name}", "", "| | " + " | ".join(c for c, _ in COLUMNS.values()) + " |"]
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        for how, row in rows.items():
            cells = []
            for key, (_, scale) in COLUMNS.items():
                if key not in row:
                    cells.append("–")
                elif scale == 100:
                    cells.append(f"{100 * row[key]:.1f} %")
                else:
                    cells.append(f"{row[key]:.0f}" if key == "peak_mb" else f"{row[key]:.3f}")
            lines.append(f"| {how} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def scatter(test: TestSet, model: DeepEMD, path: str | Path, *, decode: str = "argmax") -> Path:
    """Draw estimate against exact distance for the network and Chamfer; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    exact = test.distance.numpy()
    for name, options in (
        ("Chamfer (half-sum)", {"method": "chamfer", "mean_of_two": True}),
        (f"network, {decode}", {"method": "deepemd", "model": model, "decode": decode}),
    ):
        value = torch.cat([part[0] for part in _run(test, 16, **options)]).numpy()
        axes.plot(exact, value, ".", label=name, alpha=0.7)
    top = float(np.max(exact)) * 1.05
    axes.plot([0, top], [0, top], "k-", lw=0.8)
    axes.set(xlabel="exact EMD", ylabel="estimate", title=test.name)
    axes.legend()
    figure.savefig(path, dpi=150)
    return Path(path)
