"""The experiments run end to end at small sizes; the models learn what they must."""

from __future__ import annotations

import json

import pytest
import torch

from hypermixer import HyperMixing
from hypermixer.baselines import MixerClassifier
from hypermixer.data import load_digits, make_shapes
from hypermixer.experiments import experiment_names, run_experiment
from hypermixer.experiments import shapes as shapes_experiment
from hypermixer.experiments.common import (
    accuracy,
    cross_entropy,
    sample_batches,
    summarise,
    train,
    write_json,
)
from hypermixer.experiments.cost import slope
from hypermixer.experiments.tuning import expected_best

KEYS = {"experiment", "settings", "summary", "claims", "runs", "environment", "seconds"}


def test_names():
    assert {"shapes", "listops", "digits", "topics-pair", "cost", "tuning"} < set(
        experiment_names()
    )
    with pytest.raises(ValueError, match=r"experiment must be one of shapes, .*; got 'mnist'"):
        run_experiment("mnist")


def test_shapes_experiment():
    lines = []
    result = run_experiment(
        "shapes", seeds=1, mixers=("none", "hypermixer"), steps=2, num_train=100, num_test=20,
        progress=lines.append,
    )  # fmt: skip
    assert set(result) == KEYS
    assert [row["model"] for row in result["summary"]] == ["none", "hypermixer"]
    assert len(result["claims"]) == 2
    assert len(lines) == 2
    json.dumps(result)
    part = run_experiment(
        "shapes", seeds=1, mixers=("attention",), steps=1, num_train=50, num_test=10, looked_at=1
    )
    assert part["claims"] == []


@pytest.mark.parametrize("name", ["digits", "topics-pair"])
def test_classification_experiments(name):
    mixers = ("hypermixer", "attention", "mlp-mixer", "fnet")
    seeds = 2 if name == "digits" else 1
    result = run_experiment(name, seeds=seeds, mixers=mixers, steps=1, fraction=0.05)
    assert set(result) == KEYS
    assert len(result["runs"]) == 4 * seeds
    counts = [row["parameters"] for row in result["summary"]]
    assert max(counts) < 1.02 * min(counts)
    texts = [c["claim"] for c in result["claims"]]
    assert ("96 % of the test digits" in texts) is (name == "digits")
    alone = run_experiment(name, seeds=1, mixers=("fnet",), steps=1, fraction=0.05)
    assert alone["claims"] == []


def test_listops_experiment(monkeypatch):
    from hypermixer.experiments import classification

    tokens = torch.randint(1, 10, (60, 12))
    options = {"num_classes": 10, "vocab_size": 16, "max_length": 12}
    small = (tokens[:40], tokens[:40, 0]), (tokens[40:], tokens[40:, 0]), options
    monkeypatch.setitem(classification.LOADERS, "listops", lambda seed, folder: small)
    assert run_experiment("listops", seeds=1, mixers=("hypermixer",), steps=1)["claims"] == []


def test_text_experiments_need_their_folder(tmp_path):
    with pytest.raises(ValueError, match="give --data-dir"):
        run_experiment("sst2", seeds=1)
    folder = tmp_path / "trec"
    folder.mkdir()
    (folder / "train_5500.label").write_text("A:x one two\nB:y three\n" * 20, encoding="latin-1")
    (folder / "TREC_10.label").write_text("A:x two\n", encoding="latin-1")
    result = run_experiment("trec", seeds=1, mixers=("hypermixer",), steps=1, data_dir=tmp_path)
    assert result["settings"]["train"] == 40


def test_cost_experiment():
    result = run_experiment("cost", lengths=(512, 1024), repeats=1)
    forms = {row["model"]: row for row in result["summary"]}
    assert set(forms) == {"hypermixer", "direct", "attention"}
    assert forms["hypermixer"]["memory_exponent"] <= 1.05
    assert len(result["claims"]) == 2


def test_slope_of_a_power_law():
    assert slope([1, 10, 100], [5, 5 * 10**1.5, 5 * 10**3]) == pytest.approx(1.5)


def test_tuning_experiment():
    mixers = ("hypermixer", "attention")
    result = run_experiment("tuning", mixers=mixers, steps=1, num_samples=2, task="digits")
    assert [row["model"] for row in result["summary"]] == ["hypermixer", "attention"]
    assert set(result["summary"][0]) == {"model", "best_of_1", "best_of_2"}
    assert len(result["claims"]) == 1


def test_expected_best_equals_enumeration():
    import itertools

    scores = [3.0, 1.0, 2.0]
    for n in (1, 2, 3):
        draws = list(itertools.product(scores, repeat=n))
        mean = sum(map(max, draws)) / len(draws)
        assert expected_best(scores)[n - 1] == pytest.approx(mean)


def test_summaries_are_means_and_deviations():
    runs = [{"model": "a", "parameters": 1, "x": v} for v in (1.0, 3.0)]
    assert summarise(runs, ["x"]) == [
        {"model": "a", "parameters": 1, "x": 2.0, "x_std": pytest.approx(2**0.5)}
    ]
    assert summarise(runs[:1], ["x"])[0]["x_std"] == 0.0


def test_json_files_are_whole_or_old(tmp_path):
    path = tmp_path / "deep" / "r.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_batches_cover_the_data_and_cut_shared_padding():
    tokens = torch.tensor([[i + 1] * (i % 7 + 1) + [0] * (19 - i % 7) for i in range(100)])
    labels = torch.arange(100)
    source = sample_batches((tokens, labels), 10, seed=0)
    seen = []
    for _ in range(10):
        batch, own = next(source)
        assert batch.shape[1] == int((batch != 0).sum(1).max())
        seen += own.tolist()
    assert sorted(seen) == list(range(100))


def test_hypermixing_solves_the_shapes_that_convolutions_cannot():
    scenes, held_out = make_shapes(1000, seed=0), make_shapes(200, seed=1)
    errors = {}
    for mixer, steps in (("none", 400), ("hypermixer", 400)):
        model = shapes_experiment.fit(mixer, scenes, steps=steps, seed=0)
        errors[mixer] = shapes_experiment.test_error(model, held_out)
    assert errors["hypermixer"] < 0.5 * errors["none"]


@pytest.mark.slow
def test_digits_reach_96_percent():
    train_part, test_part = load_digits(patch=2)
    torch.manual_seed(0)
    model = MixerClassifier("hypermixer", 10, num_features=4, max_length=16)
    source = sample_batches(train_part, 32, 0)
    train(model, source, cross_entropy, 700, learning_rate=2e-3)
    assert accuracy(model, test_part) >= 96.0


def test_copying_from_a_marked_position():
    """Every token is to give the content of the one marked token: one look-up by content."""
    layer = HyperMixing(16, 32, init="xavier", norm=False, token_info=None)
    read_in, read_out = torch.nn.Linear(9, 16), torch.nn.Linear(16, 8)
    parameters = [*layer.parameters(), *read_in.parameters(), *read_out.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch(size):
        content = torch.randint(8, (size, 12), generator=generator)
        marked = torch.randint(12, (size, 1), generator=generator)
        mark = torch.zeros(size, 12, 1).scatter_(1, marked.unsqueeze(-1), 1.0)
        tokens = torch.cat([torch.nn.functional.one_hot(content, 8).float(), mark], -1)
        return tokens, content.gather(1, marked).expand(-1, 12)

    def logits(tokens):
        x = read_in(tokens)
        return read_out(x + layer(x))

    for _ in range(400):
        tokens, wanted = batch(32)
        loss = torch.nn.functional.cross_entropy(logits(tokens).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, wanted = batch(200)
    with torch.no_grad():
        right = (logits(tokens).argmax(-1) == wanted).float().mean()
    assert right > 0.95
