"""Sentence classification from files in a folder: SST-2, AG News and TREC, words as tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

Rows = list[tuple[str, str]]
TASKS = ("sst2", "agnews", "trec")


class TextData(NamedTuple):
    """Token ids (n, length), 0 being padding and 1 unknown words, with their labels (n,)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    vocabulary: list[str]
    labels: list[str]


def words(text: str) -> list[str]:
    """Return lower-case words and signs.

    Example:
        >>> words("It's here.")
        ['it', "'", 's', 'here', '.']
    """
    return re.findall(r"\w+|[^\w\s]", text.lower())


def build_vocabulary(texts: Iterable[list[str]], size: int) -> list[str]:
    """Return the most frequent words, after padding and unknown."""
    counts = Counter(word for text in texts for word in text)
    return ["<pad>", "<unk>", *(word for word, _ in counts.most_common(size - 2))]


def encode(texts: list[list[str]], vocabulary: list[str], length: int) -> Tensor:
    """Return token ids (n, length), cut or filled up with 0."""
    index = {word: i for i, word in enumerate(vocabulary)}
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        known = [index.get(word, 1) for word in text[:length]]
        ids[row, : len(known)] = torch.tensor(known, dtype=torch.long)
    return ids


def read_tsv(path: Path) -> Rows:
    """Read ``sentence<TAB>label`` lines; a header line "sentence<TAB>label" is skipped."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        sentence, tab, label = line.rpartition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: expected 'sentence<TAB>label', got {line!r}")
        rows.append((sentence.strip(), label.strip()))
    return rows[1:] if rows and rows[0] == ("sentence", "label") else rows


def read_trec(path: Path) -> Rows:
    """Read ``LABEL:sublabel question`` lines, which are latin-1."""
    rows = []
    for line in path.read_text(encoding="latin-1").splitlines():
        label, _, question = line.partition(" ")
        rows.append((question, label.split(":")[0]))
    return rows


def _read(task: str, folder: Path) -> tuple[Rows, Rows]:
    if task == "sst2":
        return read_tsv(folder / "train.tsv"), read_tsv(folder / "dev.tsv")
    if task == "trec":
        return read_trec(folder / "train_5500.label"), read_trec(folder / "TREC_10.label")
    rows = read_tsv(folder / "dev.tsv")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    test = set(order[: len(rows) // 5])
    return (
        [row for i, row in enumerate(rows) if i not in test],
        [row for i, row in enumerate(rows) if i in test],
    )


def load_text(
    task: str, data_dir: str | Path, *, max_length: int = 64, vocab_size: int = 10_000
) -> TextData:
    """Load a task from ``data_dir/<task>``.

    ``sst2`` holds train.tsv and dev.tsv (sentence, label), ``agnews`` dev.tsv (split 80/20 here,
    always the same way), ``trec`` train_5500.label and TREC_10.label. The vocabulary is that of the
    training part.

    Args:
        task: "sst2", "agnews" or "trec".
        data_dir: folder of the tasks' folders.
        max_length: tokens of a sentence; the rest is cut off.
        vocab_size: most frequent words kept.

    Raises:
        ValueError: for an unknown task or a line that cannot be read.
        FileNotFoundError: where the files are not there.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    folder = Path(data_dir) / task
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there; --data-dir must hold the folder {task!r}")
    train, test = _read(task, folder)
    labels = sorted({label for _, label in train})
    train_words = [words(text) for text, _ in train]
    vocabulary = build_vocabulary(train_words, vocab_size)

    def part(texts: list[list[str]], rows: Rows) -> tuple[Tensor, Tensor]:
        return encode(texts, vocabulary, max_length), torch.tensor(
            [labels.index(label) for _, label in rows]
        )

    test_words = [words(text) for text, _ in test]
    return TextData(part(train_words, train), part(test_words, test), vocabulary, labels)
