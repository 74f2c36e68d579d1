from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import palora
from palora.core.simplex import evaluation_grid, grid_size


def test_worked_schedule() -> None:
    three = palora.Schedule(2, num=3)
    assert three(0.2)[:, 0].tolist() == pytest.approx([0.01, 0.5, 0.99], abs=1e-7)
    last = three(1.0)
    assert float(last[0, 0]) == pytest.approx(0.01**5 / (0.01**5 + 0.99**5), rel=1e-4)
    assert float(last[0, 0]) == pytest.approx(1.0515e-10, rel=1e-4)
    assert float(last[1, 0]) == pytest.approx(0.5)
    five = palora.Schedule(2, num=5)(0.5)[:, 0].tolist()
    assert five == pytest.approx([1.0254e-5, 6.4146e-2, 0.5, 0.93585, 0.99999], rel=1e-4)


def test_worked_lattice_and_its_order() -> None:
    assert palora.simplex_grid(3, 2).tolist() == [
        [1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(("tasks", "resolution"), [(2, 7), (3, 4), (4, 3), (6, 2)])
def test_lattice_is_das_dennis(tasks: int, resolution: int) -> None:
    expected = {
        c for c in itertools.product(range(resolution + 1), repeat=tasks) if sum(c) == resolution
    }
    grid = (palora.simplex_grid(tasks, resolution) * resolution).round().long()
    assert {tuple(row) for row in grid.tolist()} == expected
    assert len(grid) == grid_size(tasks, resolution) == math.comb(resolution + tasks - 1, tasks - 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [((1, 3), "tasks must be at least 2"), ((3, 0), "resolution"), ((10, 40), "more than 1000000")],
)
def test_lattices_that_are_refused(args: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        palora.simplex_grid(*args)


@pytest.mark.parametrize("tasks", range(2, 11))
@pytest.mark.parametrize("mode", ["anneal", "fixed", "dirichlet", "anneal-dirichlet"])
def test_preferences_lie_on_the_simplex(tasks: int, mode: Any) -> None:
    schedule = palora.Schedule(tasks, num=6, mode=mode, seed=0)
    for step in range(1, 21):
        rays = schedule(step / 20)
        assert rays.shape == (6, tasks)
        assert rays.dtype == torch.float32
        assert (rays >= 0).all()
        torch.testing.assert_close(rays.sum(1), torch.ones(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 3, 5, 10])
def test_annealing_starts_uniform_passes_the_grid_and_sharpens(tasks: int) -> None:
    num = {2: 5, 3: 6, 5: 15, 10: 10}[tasks]
    anneal = palora.Schedule(tasks, num=num)
    even = palora.Schedule(tasks, num=num, mode="fixed")(0.5)
    torch.testing.assert_close(anneal(0.0), torch.full((num, tasks), 1 / tasks))
    torch.testing.assert_close(anneal(0.2), even, rtol=1e-5, atol=1e-7)
    resolution = next(h for h in range(1, 99) if grid_size(tasks, h) == num)
    expected = 0.01 + (1 - tasks * 0.01) * palora.simplex_grid(tasks, resolution)
    rows = sorted(even.tolist())
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(sorted(expected.tolist())))
    entropies = []
    for step in range(21):
        rays = anneal(step / 20)
        entropies.append(-(rays * rays.clamp_min(1e-30).log()).sum(1))
    for before, after in itertools.pairwise(entropies):
        assert (after <= before + 1e-5).all()


def test_two_tasks_are_symmetric_under_reversal() -> None:
    schedule = palora.Schedule(2, num=7)
    for tau in (0.1, 0.37, 1.0):
        rays = schedule(tau)
        torch.testing.assert_close(rays, rays.flip(0, 1))


@pytest.mark.parametrize(("tasks", "num"), [(3, 5), (3, 4), (4, 3), (7, 5), (10, 2), (40, 3)])
def test_larger_lattices_are_visited_equally_often(tasks: int, num: int) -> None:
    schedule = palora.Schedule(tasks, num=num, mode="fixed", epsilon=0.001)
    size = len(schedule.base)
    assert size >= num
    counts: dict[tuple[float, ...], int] = {}
    for step in range(size):
        rays = schedule(0.5)
        assert len({tuple(r) for r in rays.tolist()}) == num  # no ray twice in a step
        for row in rays.tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        partial = list(counts.values()) + [0] * (size - len(counts))
        assert max(partial) - min(partial) <= 1, step
    assert set(counts.values()) == {num}
    assert len(counts) == size


def test_every_task_is_weighted_within_a_few_steps() -> None:
    schedule = palora.Schedule(3, num=6)
    assert (schedule(1.0).amax(0) > 0.99).all()
    seven = palora.Schedule(3, num=5)
    assert (torch.cat([seven(1.0) for _ in range(2)]).amax(0) > 0.99).all()


@pytest.mark.parametrize("mode", ["anneal", "fixed", "dirichlet", "anneal-dirichlet"])
def test_same_seed_same_preferences_and_resume(mode: Any) -> None:
    first, second = (palora.Schedule(4, num=3, mode=mode, seed=7) for _ in range(2))
    for step in range(5):
        assert torch.equal(first(step / 9), second(step / 9))
    third = palora.Schedule(4, num=3, mode=mode, seed=8)
    third.load_state_dict(first.state_dict())
    for step in range(5, 9):
        assert torch.equal(first(step / 9), third(step / 9))


def test_explicit_steps_do_not_depend_on_the_calls_before() -> None:
    schedule, other = (palora.Schedule(3, num=4, mode="fixed") for _ in range(2))
    steps = [schedule(0.5) for _ in range(6)]
    assert torch.equal(other(0.5, step=4), steps[4])
    assert torch.equal(other(0.5), steps[5])


def test_dirichlet_concentration_falls_when_annealed() -> None:
    schedule = palora.Schedule(3, num=500, mode="anneal-dirichlet", seed=0)
    early, late = schedule(0.001).amax(1).mean(), schedule(1.0).amax(1).mean()
    assert late > 0.99
    assert early < 0.7
    flat = palora.Schedule(3, num=4000, mode="dirichlet", seed=0)(0.5)
    # Dir(1): mean 1/3, variance 1/18 of each component
    torch.testing.assert_close(flat.mean(0), torch.full((3,), 1 / 3), rtol=0, atol=0.02)
    torch.testing.assert_close(flat.var(0), torch.full((3,), 1 / 18), rtol=0, atol=0.005)


def test_energy_layout_has_exactly_num_points() -> None:
    pytest.importorskip("pymoo")
    rays = palora.Schedule(3, num=7, mode="fixed", layout="energy")(0.5)
    assert rays.shape == (7, 3)
    assert (rays >= 0.0099).all()


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"tasks": 1}, "tasks must be an integer of at least 2"),
        ({"num": 1}, "num of at least 2.*'dirichlet'"),
        ({"num": 1, "mode": "fixed"}, "num of at least 2.*'dirichlet'"),
        ({"num": 0, "mode": "dirichlet"}, "num must be an integer of at least 1"),
        ({"num": 2.5}, "num must be an integer"),
        ({"tasks": "ab"}, "tasks must be an integer of at least 2, got 'ab'"),
        ({"temperature": float("nan")}, "must be positive and finite"),
        ({"mode": "x"}, "mode must be one of"),
        ({"layout": "x"}, "layout must be"),
        ({"epsilon": 0.5}, r"epsilon must be in \[0, 1/2\)"),
        ({"p": 0.0}, "must be positive"),
        ({"temperature": 0.0}, "must be positive"),
        ({"tasks": 3, "num": 5, "cycle": False}, "nearest sizes are 3 6"),
        ({"tasks": 3, "num": 2, "cycle": False}, "nearest sizes are  3"),
    ],
)
def test_bad_arguments(kw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        palora.Schedule(**{"tasks": 2, **kw})


def test_progress_is_bounded_and_state_must_fit() -> None:
    schedule = palora.Schedule(2)
    assert torch.equal(schedule(1 + 5e-7), schedule(1.0))
    for bad in (-0.1, 1.001, float("nan")):
        with pytest.raises(ValueError, match=r"progress must be in \[0, 1\]"):
            schedule(bad)
    with pytest.raises(ValueError, match="num is 4 here and 5 there"):
        palora.Schedule(2, num=4).load_state_dict(schedule.state_dict())


@pytest.mark.parametrize("tasks", [2, 3])
def test_points_on_the_faces_start_at_the_centre_too(tasks: int) -> None:
    """Without ε a base point has zeros, and 0·log 0 is not a number."""
    schedule = palora.Schedule(tasks, num=3, epsilon=0.0)
    assert torch.equal(schedule(0.0), torch.full((3, tasks), 1 / tasks))
    base = schedule.base.numpy()
    for tau in (0.1, 0.2, 1.0):
        expected = base ** (5 * tau) / (base ** (5 * tau)).sum(1, keepdims=True)
        np.testing.assert_allclose(schedule(tau).numpy(), expected, atol=1e-7)


@pytest.mark.parametrize(("tasks", "count"), [(2, 11), (3, 66), (7, 28)])
def test_evaluation_covers_vertices_and_centre(tasks: int, count: int) -> None:
    grid = evaluation_grid(tasks)
    assert grid.shape == (count, tasks)
    assert (grid >= 0).all()
    torch.testing.assert_close(grid.sum(1), torch.ones(count))
    rows = {tuple(row) for row in grid.tolist()}
    assert {tuple(row) for row in torch.eye(tasks).tolist()} <= rows
    if tasks != 3:  # 1/3 is no multiple of 1/10
        assert (grid - 1 / tasks).abs().sum(1).min() < 1e-6
    assert torch.equal(grid, evaluation_grid(tasks))
    assert len(rows) == count
