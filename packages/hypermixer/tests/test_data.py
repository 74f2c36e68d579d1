"""The generated data have the properties that their descriptions promise."""

from __future__ import annotations

import pytest
import torch

from hypermixer.data import (
    load_digits,
    load_text,
    make_listops,
    make_shapes,
    make_topic_pairs,
)
from hypermixer.data.digits import patches
from hypermixer.data.listops import VOCABULARY, evaluate
from hypermixer.data.text import read_tsv


def test_shapes_are_apart_and_their_twins_differ():
    scenes = make_shapes(200, seed=1)
    assert scenes.signal.shape == scenes.target.shape == (200, 100)
    assert int(scenes.support.sum(1).max()) == 1
    widths = scenes.support.sum(2)
    assert int(widths.min()) >= 4
    assert int(widths.max()) <= 13
    assert (scenes.target - scenes.signal)[~scenes.support.any(1)].abs().max() <= 0.15


@pytest.mark.parametrize("group", ["kind", "location"])
def test_targets_average_the_heights_of_each_group(group):
    scenes = make_shapes(100, seed=2, group=group)
    for i in range(100):
        before = [float(scenes.signal[i, s].max()) for s in scenes.support[i]]
        after = [float(scenes.target[i, s].max()) for s in scenes.support[i]]
        for shape, twin in enumerate(scenes.twin[i].tolist()):
            assert scenes.twin[i, twin] == shape
            if shape >= 2 and twin >= 2:  # boxes: every sample is the height, up to the noise
                mean = (before[shape] + before[twin]) / 2
                assert after[shape] == pytest.approx(mean, abs=0.16)
                assert after[shape] == pytest.approx(after[twin], abs=1e-4)
    if group == "kind":
        assert scenes.twin[0].tolist() == [1, 0, 3, 2]
    else:
        first = scenes.support.float().argmax(2)
        for i in range(100):
            left, right = first[i].argsort()[:2].tolist(), first[i].argsort()[2:].tolist()
            assert scenes.twin[i, left[0]] == left[1]
            assert scenes.twin[i, right[0]] == right[1]


def test_shapes_are_reproducible():
    assert torch.equal(make_shapes(5, seed=3).signal, make_shapes(5, seed=3).signal)
    assert not torch.equal(make_shapes(5, seed=3).signal, make_shapes(5, seed=4).signal)
    with pytest.raises(ValueError, match="group must be 'kind' or 'location', got 'size'"):
        make_shapes(5, group="size")


def value_of(tokens: list[str]) -> int:
    """Evaluate an expression with a stack, apart from the generator's recursion."""
    stack: list[list] = [[]]
    for token in tokens:
        if token == "]":
            operator, *values = stack.pop()
            stack[-1].append(evaluate(operator, values))
        elif token.startswith("["):
            stack.append([token])
        else:
            stack[-1].append(int(token))
    return stack[0][0]


def test_listops_expressions_have_their_values():
    tokens, values = make_listops(300, seed=1)
    assert len({tuple(row.tolist()) for row in tokens}) == 300
    for row, value in zip(tokens, values, strict=True):
        words = [VOCABULARY[i] for i in row.tolist() if i]
        assert 20 < len(words) < 120
        assert value_of(words) == int(value)
        assert words.count("]") == sum(word.startswith("[") for word in words)


def test_listops_operators():
    assert evaluate("[MED", [1, 2, 4, 9]) == 3
    assert evaluate("[MED", [1, 2]) == 1
    assert evaluate("[SM", [9, 9, 9]) == 7
    assert evaluate("[MIN", [4, 2]) == 2
    assert evaluate("[MAX", [4, 2]) == 4


def test_listops_depth_and_arguments_are_bounded():
    tokens, _ = make_listops(100, max_depth=3, max_args=4, min_length=5, max_length=40)
    for row in tokens.tolist():
        depth = deepest = 0
        for word in (VOCABULARY[i] for i in row if i):
            depth += word.startswith("[") - (word == "]")
            deepest = max(deepest, depth)
        assert deepest <= 2


def test_digits_as_patches():
    (train, labels), (test, _) = load_digits(patch=2)
    assert train.shape == (1437, 16, 4)
    assert test.shape == (360, 16, 4)
    assert set(labels.tolist()) == set(range(10))
    assert float(train.min()) >= 0
    assert float(train.max()) == 1.0
    image = torch.arange(16.0).view(1, 4, 4)
    assert patches(image, 2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "hypermixer\[data\]"'):
        load_digits()


def test_topic_pairs_are_balanced_and_split_by_window():
    data = make_topic_pairs(400, 100, seed=1)
    tokens, segments, labels = data.train
    assert tokens.shape == (400, 96)
    assert segments[0].tolist() == [0] * 48 + [1] * 48
    assert int(labels.sum()) == 200

    def windows(part):
        return {tuple(row[a : a + 48].tolist()) for row in part[0] for a in (0, 48)}

    assert not windows(data.train) & windows(data.test)
    assert (tokens == 1).sum() == 0  # the vocabulary is the training windows'
    same = tokens[labels == 1]
    assert not (same[:, :48] == same[:, 48:]).all(1).any()


def write(folder, name, text, encoding="utf-8"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding=encoding)


def test_sst2_files(tmp_path):
    write(tmp_path / "sst2", "train.tsv", "sentence\tlabel\na good film \t1\nbad , bad film\t0\n")
    write(tmp_path / "sst2", "dev.tsv", "sentence\tlabel\nan unseen film\t1\n")
    data = load_text("sst2", tmp_path, max_length=5)
    assert data.labels == ["0", "1"]
    assert data.vocabulary[:2] == ["<pad>", "<unk>"]
    ids = {word: i for i, word in enumerate(data.vocabulary)}
    assert data.train[0][0].tolist() == [ids["a"], ids["good"], ids["film"], 0, 0]
    assert data.test[0][0].tolist() == [1, 1, ids["film"], 0, 0]
    assert data.train[1].tolist() == [1, 0]


def test_agnews_and_trec_files(tmp_path):
    rows = "".join(f"text number {i}\t{'World' if i % 2 else 'Sports'}\n" for i in range(10))
    write(tmp_path / "agnews", "dev.tsv", rows)
    data = load_text("agnews", tmp_path)
    assert len(data.train[1]) == 8
    assert len(data.test[1]) == 2
    assert data.labels == ["Sports", "World"]
    write(tmp_path / "trec", "train_5500.label", "DESC:manner How ?\nLOC:city Où ?\n", "latin-1")
    write(tmp_path / "trec", "TREC_10.label", "LOC:city Where ?\n", "latin-1")
    data = load_text("trec", tmp_path)
    assert data.labels == ["DESC", "LOC"]
    assert "où" in data.vocabulary
    assert data.test[1].tolist() == [1]


def test_text_errors(tmp_path):
    with pytest.raises(ValueError, match="task must be one of sst2, agnews, trec; got 'imdb'"):
        load_text("imdb", tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold the folder 'sst2'"):
        load_text("sst2", tmp_path)
    write(tmp_path, "bad.tsv", "no tab here\n")
    with pytest.raises(ValueError, match=r"bad\.tsv, line 1: expected 'sentence<TAB>label'"):
        read_tsv(tmp_path / "bad.tsv")
