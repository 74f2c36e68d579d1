"""Score matching that works: digits, five models and three seeds, and a classifier whose saliency maps lie.

    python examples/demo.py [--out DIR] [--seed 0] [--quiet] [--json]

Trains every model on scikit-learn's digits, samples from it, and asks a support vector machine what the
samples show. Writes figures and demo.json, and exits with 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gradient_alignment as ga
from gradient_alignment.plots import curves, image_rows
from gradient_alignment.recipes.data import digits
from gradient_alignment.recipes.evaluate import (
    Evaluation,
    compare_fooled,
    drawn_pattern,
    evaluate,
    svm_judge,
)
from gradient_alignment.recipes.train import Config, train

BASE, NORM = "baseline", "gradient norm"
PLAIN, SCORE = "score matching, published estimator", "score matching, control variate"
ANTI, ANTI_PLAIN = "anti-score-matching", "anti, published estimator"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("none", {}),
    NORM: ("gradient-norm", {"weight": 1e-2}),
    PLAIN: ("score", {"weight": 1e-3, "estimator": "taylor"}),
    SCORE: ("score", {"weight": 1e-2}),
    ANTI: ("anti", {"weight": 1e-2}),
    ANTI_PLAIN: ("anti", {"weight": 1e-3, "estimator": "taylor", "sigma": 1e-3}),
}
EPOCHS = 20


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", default="build/demo/gradient-alignment", help="folder for figures and demo.json"
    )
    parser.add_argument("--seed", type=int, default=0, help="first of the seeds")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    parser.add_argument("--json", action="store_true", help="print demo.json instead of the table")
    return parser.parse_args()


def run(job: tuple[str, int]) -> tuple[str, int, Evaluation, dict[str, Any]]:
    """Train and evaluate one model; in a process of its own."""
    torch.set_num_threads(1)
    name, seed = job
    regularizer, arguments = MODELS[name]
    data = digits(seed)
    trained = train(
        data, Config(regularizer=regularizer, options=arguments, epochs=EPOCHS, seed=seed)
    )
    found = evaluate(trained.model, data, svm_judge(data), num_samples=200, seed=seed)
    return name, seed, found, {"state": trained.model.state_dict(), "seconds": trained.seconds}


def train_all(args: argparse.Namespace) -> tuple[dict[str, list[Evaluation]], dict[str, Any]]:
    jobs = [(name, seed) for seed in range(args.seed, args.seed + args.seeds) for name in MODELS]
    results: dict[str, list[Evaluation]] = {name: [] for name in MODELS}
    first: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.jobs) as pool:
        for count, (name, seed, found, extra) in enumerate(pool.imap(run, jobs), start=1):
            results[name].append(found)
            if seed == args.seed:
                first[name] = extra["state"]
            if args.quiet:
                continue
            print(
                f"[{count}/{len(jobs)}] seed {seed}, {name}: accuracy {found.accuracy:.3f}, "
                f"trained in {extra['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return results, first


def mean(results: list[Evaluation], field: str) -> float:
    return float(np.mean([getattr(each, field) for each in results]))


def every(results: dict[str, list[Evaluation]], name: str, field: str) -> list[float]:
    return [getattr(each, field) for each in results[name]]


def spread(values: list[float], digits_after: int = 2) -> str:
    return ", ".join(f"{value:.{digits_after}f}" for value in values)


def claims(results: dict[str, list[Evaluation]], fooled: Any) -> list[dict[str, Any]]:
    test = {name: every(results, name, "gan_test") for name in MODELS}
    near = {name: every(results, name, "distance") for name in MODELS}
    cosine = {name: every(results, name, "alignment") for name in MODELS}
    trace = {name: every(results, name, "trace") for name in MODELS}
    right = {name: every(results, name, "accuracy") for name in MODELS}
    kept = (NORM, PLAIN, SCORE, ANTI)
    drop = max(b - a for name in kept for a, b in zip(right[name], right[BASE], strict=True))
    return [
        {
            "claim": "Samples of the score-matched classifier are recognised by an independent judge most "
            "often, those of the anti-score-matched one least, in every seed (GAN-test)",
            "baseline": spread(test[BASE]),
            "ours": f"{spread(test[SCORE])}; anti {spread(test[ANTI])}",
            "holds": all(
                s > b > a for s, b, a in zip(test[SCORE], test[BASE], test[ANTI], strict=True)
            ),
        },
        {
            "claim": "The same order holds for the distance of a sample to the nearest training image",
            "baseline": spread(near[BASE]),
            "ours": f"{spread(near[SCORE])}; anti {spread(near[ANTI])}",
            "holds": all(
                s < 0.8 * b and b < a
                for s, b, a in zip(near[SCORE], near[BASE], near[ANTI], strict=True)
            ),
        },
        {
            "claim": "Logit gradients point to the data after score matching with the control variate (cosine of at "
            "least 0.3 with the direction to the class mean) and not without (0.1 at most; anti below 0)",
            "baseline": spread(cosine[BASE]),
            "ours": f"{spread(cosine[SCORE])}; anti {spread(cosine[ANTI])}",
            "holds": min(cosine[SCORE]) >= 0.3
            and max(cosine[BASE]) <= 0.1
            and max(cosine[ANTI]) < 0,
        },
        {
            "claim": "The control variate moves the trace where the published estimator cannot: below -200 in score "
            "matching, above +500 in anti-score-matching",
            "baseline": f"published: {spread(trace[PLAIN], 0)}; anti {spread(trace[ANTI_PLAIN], 0)}",
            "ours": f"{spread(trace[SCORE], 0)}; anti {spread(trace[ANTI], 0)}",
            "holds": max(trace[SCORE]) < -200
            and min(trace[PLAIN]) > -100
            and min(trace[ANTI]) > 500
            and max(trace[ANTI_PLAIN]) < 100,
        },
        {
            "claim": "Accuracy stays within 2 points of the baseline's in every seed",
            "baseline": spread(right[BASE], 3),
            "ours": f"largest loss {100 * drop:.1f} points",
            "holds": drop <= 0.02,
        },
        {
            "claim": "A function added to all logits shows a drawn pattern in every logit gradient (cosine above 0.95), "
            "at the same accuracy and the same loss gradients (to 1e-6)",
            "baseline": f"accuracy {fooled.accuracy[0]:.4f}, mean cosine with the pattern {fooled.own:.2f}",
            "ours": f"accuracy {fooled.accuracy[1]:.4f}, smallest cosine {fooled.shown:.4f}, "
            f"largest change of a loss gradient {fooled.loss_gradients:.1e} of their size",
            "holds": fooled.accuracy[0] == fooled.accuracy[1]
            and fooled.shown > 0.95
            and fooled.loss_gradients < 1e-6,
        },
    ]


def table(results: dict[str, list[Evaluation]]) -> dict[str, Any]:
    columns = ["model", "accuracy", "GAN-test", "nearest", "cosine", "trace", "‖∇f‖²", "log-ratio"]
    rows = []
    for name, found in results.items():
        ratio = float(np.mean([each.density[0.3] for each in found]))
        rows.append(
            [
                name,
                f"{mean(found, 'accuracy'):.3f}",
                f"{mean(found, 'gan_test'):.2f}",
                f"{mean(found, 'distance'):.2f}",
                f"{mean(found, 'alignment'):.2f}",
                f"{mean(found, 'trace'):.0f}",
                f"{mean(found, 'gradient'):.1f}",
                f"{ratio:.1f}",
            ]
        )
    count = len(results[BASE])
    return {
        "title": f"Means over {count} seeds; nearest: distance to the nearest training image; log-ratio at noise 0.3",
        "columns": columns,
        "rows": rows,
    }


def findings(results: dict[str, list[Evaluation]]) -> list[str]:
    lerf = {name: float(np.mean([e.lerf.auc for e in found])) for name, found in results.items()}
    listed = "; ".join(f"{name} {value:.3f}" for name, value in lerf.items())
    score, plain = mean(results[SCORE], "gradient"), mean(results[PLAIN], "gradient")
    return [
        (
            "Pixel perturbation, least salient pixels first, orders the models otherwise than the other measures do on "
            f"digits: aligned gradients spread over the whole image, so that more is lost with them. Area: {listed}."
        ),
        (
            f"The published estimator keeps the gradients smallest (mean ‖∇f‖² {plain:.1f} against {score:.1f}): its "
            "stability term is mostly a penalty of the gradient's norm, of weight 4μ/σ² = 40 against ½."
        ),
        (
            f"Anti-score-matching by the published estimator costs accuracy "
            f"({mean(results[ANTI_PLAIN], 'accuracy'):.3f} against {mean(results[BASE], 'accuracy'):.3f}) and does not "
            "raise the trace."
        ),
    ]


def network(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    from gradient_alignment.recipes.models import small_cnn

    net = small_cnn()
    net.load_state_dict(state)
    return net.eval()


def draw(
    results: dict[str, list[Evaluation]], states: dict[str, Any], seed: int, out: Path
) -> tuple[list[dict[str, str]], Any]:
    data = digits(seed)
    rows = [int(torch.nonzero(data.test_y == label)[0, 0]) for label in range(10)]
    x, y = data.test_x[rows], data.test_y[rows]
    shown = {
        "training images": torch.stack([data.train_x[data.train_y == k][0] for k in range(10)])
    }
    shown |= {name: found[0].samples[:10] for name, found in results.items()}
    image_rows(shown, titles=[str(k) for k in range(10)]).savefig(out / "samples.png", dpi=110)

    models = {name: network(state) for name, state in states.items()}
    maps = {name: ga.input_gradient(model, x, y) for name, model in models.items()}
    figure = image_rows({"image": x, **maps}, signed=list(maps))
    figure.savefig(out / "saliency.png", dpi=110)

    model, pattern = models[BASE].double(), drawn_pattern((1, 8, 8)).double()
    fooled = ga.fool(model, pattern, scale=1000.0)
    x64 = x.double()
    lines = {
        "image": x64,
        "logit gradient": ga.input_gradient(model, x64, y),
        "fooled: logit gradient": ga.input_gradient(fooled, x64, y),
        "loss gradient": ga.input_gradient(model, x64, y, of="loss"),
        "fooled: loss gradient": ga.input_gradient(fooled, x64, y, of="loss"),
        "fooled, centred logits": ga.input_gradient(fooled, x64, y, of="centered"),
    }
    image_rows(lines, signed=list(lines)[1:]).savefig(out / "fooling.png", dpi=110)

    perturbed = {
        name: (found[0].lerf.fractions.tolist(), found[0].lerf.values.tolist())
        for name, found in results.items()
    }
    curves(
        perturbed,
        x_label="share of pixels replaced, least salient first",
        y_label="accuracy",
        log_x=True,
    ).savefig(out / "perturbation.png", dpi=110)
    found = compare_fooled(model, fooled, pattern, data.test_x.double(), data.test_y)
    return [
        {"file": "samples.png", "caption": "Samples: 500 steps up the class logit from noise."},
        {"file": "saliency.png", "caption": "Logit gradients of the same test images."},
        {
            "file": "fooling.png",
            "caption": "A linear function added to all logits of the baseline: same predictions, same loss "
            "gradients, and every logit gradient shows the drawn pattern; centred logits are immune.",
        },
        {
            "file": "perturbation.png",
            "caption": "Pixel perturbation by each model's own gradients.",
        },
    ], found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def show(data: dict[str, Any]) -> None:
    for entry in data["claims"]:
        print(f"claim     {entry['claim']}")
        print(f"baseline  {entry['baseline']}")
        print(f"ours      {entry['ours']}")
        print(f"verdict   {'holds' if entry['holds'] else 'DOES NOT HOLD'}\n")
    for found in data["tables"]:
        print(found["title"])
        cells = [found["columns"], *found["rows"]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        print()
    for note in data["findings"]:
        print(f"finding   {note}")


def main() -> int:
    args = options()
    start = time.perf_counter()
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results, states = train_all(args)
    figures, fooled = draw(results, states, args.seed, out)
    data = {
        "package": "gradient-alignment",
        "title": "Score matching with a control variate aligns a classifier's input gradients with the data; the "
        "published estimator of the trace is noise",
        "data": "scikit-learn load_digits, 1,797 images of 8x8 pixels, 70 % to train, stratified, another "
        "split for every seed",
        "claims": claims(results, fooled),
        "tables": [table(results)],
        "figures": figures,
        "findings": findings(results),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "processor": processor(),
            "threads": f"{args.jobs} processes of one thread",
            "command": " ".join(["python", *sys.argv]),
        },
    }
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (out / "demo.json").write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(text)
    else:
        show(data)
    return 0 if all(claim["holds"] for claim in data["claims"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
