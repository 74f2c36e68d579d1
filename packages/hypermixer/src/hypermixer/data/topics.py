"""Sentence pairs from the text that every CPython carries: are two windows from one help topic?"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from hypermixer.data.text import build_vocabulary, encode

_RUN = 8  # words that two texts must share in a row to count as the same text


class PairData(NamedTuple):
    """Pairs: token ids (n, 2·window), segments (n, 2·window), labels (n,): 1 = same topic."""

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    vocabulary: list[str]


def _windows(window: int) -> list[list[list[str]]]:
    """Return each topic's windows; text that an earlier (shorter) topic has too is left out."""
    from pydoc_data.topics import topics

    seen: set[tuple[str, ...]] = set()
    cut = []
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        text = re.findall(r"[a-z]+", topics[name].lower())
        runs = [tuple(text[i : i + _RUN]) for i in range(len(text))]
        pieces = [
            text[i : i + window]
            for i in range(0, len(text) - window + 1, window)
            if sum(run in seen for run in runs[i : i + window]) < window // 8
        ]
        seen.update(runs)
        if len(pieces) >= 5:  # at least two for training and two for testing, after the split
            cut.append(pieces)
    return cut


def make_topic_pairs(
    num_train: int = 8_000,
    num_test: int = 2_000,
    *,
    window: int = 48,
    vocab_size: int = 4_000,
    seed: int = 0,
) -> PairData:
    """Draw pairs of windows from ``pydoc_data.topics``, half of them from one topic.

    Tokens are words. Topics that quote each other are cleaned of the common text. Windows do not
    overlap, and the windows of the test pairs (two in five of each topic) are in no
    training pair. The vocabulary is that of the training windows.

    Args:
        num_train: training pairs.
        num_test: test pairs.
        window: tokens of a window.
        vocab_size: most frequent words kept.
        seed: of the split and of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    train_topics, test_topics = [], []
    for pieces in _windows(window):
        order = torch.randperm(len(pieces), generator=generator).tolist()
        held_out = max(2, len(pieces) * 2 // 5)
        test_topics.append([pieces[i] for i in order[:held_out]])
        train_topics.append([pieces[i] for i in order[held_out:]])
    vocabulary = build_vocabulary((p for t in train_topics for p in t), vocab_size)
    train = _pairs(train_topics, vocabulary, num_train, window, generator)
    test = _pairs(test_topics, vocabulary, num_test, window, generator)
    return PairData(train, test, vocabulary)


def _pairs(
    topics: list[list[list[str]]],
    vocabulary: list[str],
    count: int,
    window: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    ids = [encode(pieces, vocabulary, window) for pieces in topics]

    def pick(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    rows, labels = [], []
    for number in range(count):
        same = number % 2 == 0
        a = pick(len(ids))
        b = a if same else (a + 1 + pick(len(ids) - 1)) % len(ids)
        i = pick(len(ids[a]))
        j = (i + 1 + pick(len(ids[a]) - 1)) % len(ids[a]) if same else pick(len(ids[b]))
        rows.append(torch.cat([ids[a][i], ids[b][j]]))
        labels.append(int(same))
    tokens = torch.stack(rows)
    segments = (torch.arange(2 * window) >= window).long().expand(count, -1)
    return tokens, segments, torch.tensor(labels)
