"""Write the model card of a bundled checkpoint: what it was trained on, and every metric, measured here.

python benchmarks/make_card.py tiny --log runs/tiny/log.jsonl --notes notes.md
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

import deepemd
from deepemd.core.hub import SHA256, WEIGHTS, from_pretrained
from deepemd.recipes.evaluate import TEST_SEED, evaluate, markdown

CARD = """# {name}

A {params:,}-parameter DeepEMD network (d={width}, {depth} blocks, {num_heads} heads, Fourier {fourier}, arch "{arch}", pattern
"{pattern}", head "{head}"), stored in half precision. SHA-256 of `model.safetensors`:
`{digest}`.

## Training

{steps:,} steps, about {pairs:,} pairs with exact labels, {seconds:,.0f} s of wall-clock time.

{notes}

```sh
deepemd train benchmarks/{name}.json --half
```

```json
{config}
```

## What it is for

Point clouds of 2 or 3 coordinates, about 32 to 1024 points, of equal size. It was trained on synthetic shapes
only. `argmax` and `soft` are estimates without a bound, and argmax is biased low; `refine` is certified. On a CPU the exact
solver is faster at these sizes (see `benchmarks/RESULTS.md`).

## Metrics

Frozen test sets: `deepemd.recipes.evaluate.frozen_set(N, pairs)` with seed {seed}, exact labels, fresh pairs of
the default mixture; "unseen shapes" are those of `deepemd.data.unseen`; digits are scikit-learn's. Errors are of the
distance; "grad. cos" is the cosine to the exact gradient, "by rows" with every point's gradient normalised;
"UB excess" is how far the permutation is above the optimum; "dual gap" how far the lower bound is below it. Measured
with torch {torch} on {processor}, one thread of a shared machine (times are indicative).

{report}"""


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--log", required=True)
    parser.add_argument("--notes", help="file with remarks on the run")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--pairs", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = from_pretrained(args.name)
    lines = [json.loads(line) for line in Path(args.log).read_text(encoding="utf-8").splitlines()]
    config = json.loads(Path(__file__).with_name(f"{args.name}.json").read_text(encoding="utf-8"))
    every = lines[1]["step"] - lines[0]["step"]
    pairs = sum(config["points"] // line["n"] * every for line in lines)
    report = evaluate(model, args.sizes, pairs=args.pairs, progress=True)
    notes = Path(args.notes).read_text(encoding="utf-8").strip() if args.notes else ""
    text = CARD.format(
        name=args.name, params=sum(p.numel() for p in model.parameters()), digest=SHA256[args.name],
        steps=lines[-1]["step"], pairs=round(pairs, -3), seconds=lines[-1]["seconds"], notes=notes,
        config=json.dumps(config, indent=1), seed=TEST_SEED, torch=torch.__version__,
        processor=processor(), report=markdown(report), **model.config,
    )  # fmt: skip
    (WEIGHTS / args.name / "README.md").write_text(text, encoding="utf-8")
    Path(f"{args.name}-report.json").write_text(
        json.dumps({"report": report, "version": deepemd.__version__}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
