"""The replay memory and the streams behind it."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import sequel
from sequel import functional as F
from sequel.buffer import Slots
from sequel.rng import draws_at, stream


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_vectorised_reservoir_equals_the_sequential_one(
    seen: int, n: int, capacity: int, seed: int
) -> None:
    u = np.random.default_rng(seed).random(n)
    held = dict.fromkeys(range(capacity), -1)
    for i in range(n):
        number = seen + i
        slot = number if number < capacity else min(int(u[i] * (number + 1)), number)
        if slot < capacity:
            held[slot] = i
    fast = F.slots_from_uniforms(u, seen, capacity)
    assert {s: i for i, s in enumerate(fast.tolist()) if s < capacity} == {
        s: i for s, i in held.items() if i >= 0
    }


def test_reservoir_is_uniform_over_pairs() -> None:
    draws = np.random.default_rng(0).random((100_000, 4))
    pairs: Counter[frozenset[int]] = Counter()
    for u in draws:
        held = [0, 1]
        for item, slot in enumerate(F.slots_from_uniforms(u, 0, 2).tolist()):
            if slot < 2:
                held[slot] = item
        pairs[frozenset(held)] += 1
    observed = [pairs[frozenset(p)] for p in combinations(range(4), 2)]
    assert chisquare(observed).pvalue > 1e-3


def test_slots_do_not_depend_on_how_the_stream_is_cut() -> None:
    def run(cuts: list[int]) -> tuple[Any, Any]:
        slots = Slots(7, seed=3)
        at = 0
        for n in cuts:
            slots.add(np.arange(at, at + n))
            at += n
        return slots.label.tolist(), slots.seen

    assert run([50]) == run([1] * 50) == run([13, 30, 7])


def test_reservoir_covers_old_and_new_items_alike() -> None:
    slots = Slots(500, seed=0)
    for start in range(0, 10_000, 100):
        slots.add(np.arange(start, start + 100))
    old = int((slots.label < 5000).sum())
    assert abs(old - 250) < 4.5 * np.sqrt(500 / 4)


def test_streams_are_functions_of_their_position() -> None:
    assert stream(0, "a", 1, 2).integers(10**9) == stream(0, "a", 1, 2).integers(10**9)
    values = {
        int(stream(seed, name, *c).integers(2**62))
        for seed in (0, 1) for name in ("a", "b") for c in ((0, 1), (1, 0), (1,), (1, 0, 1))
    }  # fmt: skip
    assert len(values) == 2 * 2 * 3  # (1,) is (1, 0)
    whole = draws_at(0, "x", 0, 50)
    assert (whole[17:30] == draws_at(0, "x", 17, 13)).all()
    assert 0 <= whole.min() <= whole.max() < 1
    with pytest.raises(ValueError, match="counters"):
        stream(0, "a", -1)


@pytest.mark.parametrize("policy", ["reservoir", "ring", "class_balanced", "gdumb"])
def test_sizes_never_exceed_the_capacity(policy: str) -> None:
    buffer = sequel.ReplayBuffer(10, policy)
    for step in range(6):
        buffer.add(x=torch.full((7, 2), float(step)), y=torch.arange(7) % 3)
        assert len(buffer) == min(7 * (step + 1), 10)
    assert len(buffer.sample(99)["y"]) == 10


def test_balanced_policies_hold_classes_evenly_in_an_imbalanced_stream() -> None:
    labels = np.repeat([0, 0, 0, 0, 0, 0, 0, 1, 2], 40)
    for policy in ("class_balanced", "gdumb"):
        slots = Slots(30, policy)
        slots.add(np.random.default_rng(0).permutation(labels))
        assert np.bincount(slots.label).tolist() == [10, 10, 10]


def test_ring_keeps_the_last_items_of_all_or_of_each_class() -> None:
    slots = Slots(4, "ring")
    slots.add(np.arange(10))
    assert sorted(slots.label.tolist()) == [6, 7, 8, 9]
    buffer = sequel.ReplayBuffer(4, "ring", n_classes=2)
    buffer.add(x=torch.arange(9.0), y=torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 0]))
    assert sorted(buffer.sample(4)["x"].tolist()) == [4.0, 6.0, 7.0, 8.0]


def test_herding_policy_keeps_an_equal_share_of_the_best_exemplars() -> None:
    rng = torch.Generator().manual_seed(0)
    buffer = sequel.ReplayBuffer(12, "herding")
    kept: dict[int, list[int]] = {}
    for label in range(3):
        phi = torch.randn(20, 4, generator=rng)
        x = torch.arange(20) + 100 * label
        buffer.add(x=x, y=torch.full((20,), label), features=phi)
        kept[label] = (F.herding(phi, 4) + 100 * label).tolist()
    assert sorted(buffer.sample(12)["x"].tolist()) == sorted(
        functools.reduce(operator.iadd, kept.values(), [])
    )
    with pytest.raises(ValueError, match="features"):
        buffer.add(x=torch.zeros(1, dtype=torch.int64), y=torch.zeros(1, dtype=torch.int64))


def test_balanced_samples_draw_classes_evenly() -> None:
    buffer = sequel.ReplayBuffer(60)
    buffer.add(x=torch.zeros(60, 1), y=torch.tensor([0] * 50 + [1] * 10))
    y = buffer.sample(16, balanced=True)["y"]
    assert (y == 0).sum() == (y == 1).sum() == 8


def test_items_keep_dtype_and_content(tmp_path: Path) -> None:
    for storage in ("ram", "device", "mmap"):
        buffer = sequel.ReplayBuffer(5, storage=storage, path=tmp_path / storage)
        x = torch.randint(0, 255, (5, 3, 2, 2), dtype=torch.uint8)
        buffer.add(x=x, y=torch.arange(5))
        out = buffer.sample(5)
        assert out["x"].dtype == torch.uint8
        assert torch.equal(out["x"], x[out["y"]])
    assert (tmp_path / "mmap" / "x.npy").exists()
    assert sequel.ReplayBuffer(2, storage="mmap")._allocate("x", x).shape[0] == 2


def test_state_dict_round_trip_goes_on_with_the_same_draws() -> None:
    one = sequel.ReplayBuffer(6, "class_balanced", seed=4)
    one.add(x=torch.arange(20.0), y=torch.arange(20) % 3)
    one.sample(2)
    two = sequel.ReplayBuffer(6, "class_balanced", seed=4)
    two.load_state_dict(one.state_dict())
    for buffer in (one, two):
        buffer.add(x=torch.arange(20.0, 40.0), y=torch.arange(20) % 3)
    a, b = one.sample(6), two.sample(6)
    assert torch.equal(a["x"], b["x"])
    with pytest.raises(ValueError, match="capacity"):
        sequel.ReplayBuffer(5, "class_balanced").load_state_dict(one.state_dict())


def test_expected_inclusion() -> None:
    buffer = sequel.ReplayBuffer(10)
    buffer.add(x=torch.zeros(40))
    assert buffer.expected_inclusion() == 0.25


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="capacity must be an integer >= 1, got 0"):
        sequel.ReplayBuffer(0)
    with pytest.raises(ValueError, match="policy"):
        sequel.ReplayBuffer(3, "fifo")
    buffer = sequel.ReplayBuffer(3)
    with pytest.raises(RuntimeError, match="empty buffer"):
        buffer.sample(1)
    buffer.add(x=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        buffer.add(x=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="float64"):
        buffer.add(x=torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="fields"):
        buffer.add(z=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="different lengths"):
        buffer.add(x=torch.zeros(2, 3), y=torch.zeros(3))
    with pytest.raises(ValueError, match="at least one field"):
        buffer.add()
    with pytest.raises(ValueError, match="needs the labels"):
        sequel.ReplayBuffer(3, "gdumb").add(x=torch.zeros(2))
    with pytest.raises(RuntimeError, match="manual"):
        Slots(3, "manual").add(np.zeros(1))


def test_class_policies_insist_on_labels_in_range(tmp_path: Path) -> None:
    x = torch.ones(5, 3)
    for policy in ("ring", "class_balanced", "gdumb"):
        with pytest.raises(ValueError, match="needs the labels"):
            sequel.ReplayBuffer(8, policy, n_classes=4).add(x=x)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\), got 3"):
        sequel.ReplayBuffer(8, "ring", n_classes=3).add(x=x, y=torch.arange(5))
    slots = sequel.ReplayBuffer(3, "ring", n_classes=5).add(x=x, y=torch.arange(5))
    assert slots.tolist() == [0, 1, 2, 3, 3]  # 3, the capacity: not stored
    with pytest.raises(ValueError, match="bfloat16"):
        sequel.ReplayBuffer(3, storage="mmap", path=tmp_path).add(x=x.bfloat16())


def test_fields_may_be_told_before_the_first_add() -> None:
    item = {"x": torch.zeros(3, dtype=torch.uint8), "y": 0, "logits": np.zeros(2, np.float32)}
    buffer = sequel.ReplayBuffer(4, fields=item)
    assert len(buffer) == 0
    x, y, z = torch.ones(2, 3, dtype=torch.uint8), torch.tensor([1, 2]), torch.rand(2, 2)
    with pytest.raises(ValueError, match=r"got fields \['x', 'y'\], the buffer has"):
        buffer.add(x=x, y=y)
    with pytest.raises(ValueError, match=r"'x' has shape .* and dtype torch.float32"):
        buffer.add(x=x.float(), y=y, logits=z)
    buffer.add(x=x, y=y, logits=z)
    found = buffer.sample(2)
    assert {k: v.dtype for k, v in found.items()} == {
        "x": torch.uint8,
        "y": torch.int64,
        "logits": torch.float32,
    }
    assert torch.equal(found["logits"][found["y"].argsort()], z)


@pytest.mark.parametrize("policy", ["class_balanced", "herding"])
def test_a_refused_add_leaves_no_fields_behind(policy: str) -> None:
    buffer, x, y = sequel.ReplayBuffer(4, policy), torch.rand(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="needs the labels"):
        buffer.add(x=x)
    if policy == "herding":
        with pytest.raises(ValueError, match="needs features"):
            buffer.add(x=x, y=y, more=x)
    buffer.add(x=x, y=y, **({"features": x} if policy == "herding" else {}))
    assert len(buffer) == 2
