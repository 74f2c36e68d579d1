"""Discrete choices: the relaxation against enumeration, the loop against toys with a known best option."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy_simulators import MATERIALS, materials, price

from mi_surrogates import (
    CallableObjective,
    Choice,
    DesignSpace,
    InfeasibleDesign,
    MIObjective,
    Optimizer,
    OptimizeResult,
    Parameter,
    optimize,
)
from mi_surrogates.cli import load_space, main
from mi_surrogates.design import Region, Relaxed, ascend, make_surrogate

HERE = Path(__file__).parent
QUICK = {
    "surrogate": "quadratic",
    "designs": 12,
    "events": 200,
    "iterations": 12,
    "progress": False,
}


def space(initial: str | None = None) -> DesignSpace:
    return DesignSpace({"m": Choice(MATERIALS, initial), "a": Parameter(0.9, 0.0, 1.0)})


def toy(where: DesignSpace, **options):
    return optimize(materials, where, MIObjective("gaussian"), **{**QUICK, **options})


def nearest_on_simplex(v: np.ndarray) -> np.ndarray:
    """The projection by sorting, Duchi et al. 2008, figure 1."""
    u = np.sort(v)[::-1]
    excess = (np.cumsum(u) - 1) / np.arange(1, len(v) + 1)
    rho = np.nonzero(u > excess)[0][-1]
    return np.maximum(v - excess[rho], 0)


@pytest.mark.parametrize("width", [1.0, 1e6])
def test_weights_are_projected_onto_the_simplex(width: float) -> None:
    each = DesignSpace({"m": Choice(["A", "B", "C", "D"]), "a": Parameter(0.5 * width, 0, width)})
    draws = np.random.default_rng(0).normal(0.25, 1.0, (50, 5)) * [1, 1, 1, 1, width]
    for found, draw in zip(each.project(draws), draws, strict=True):
        assert np.allclose(found[:4], nearest_on_simplex(draw[:4]), atol=1e-7)
        assert np.isclose(found[4], np.clip(draw[4], 0, width), rtol=1e-9)


class Known(nn.Module):
    """A surrogate of z that is a known function of θ and refuses what is not one-hot."""

    def __init__(self, region: Region, blocks: list[list[int]]) -> None:
        super().__init__()
        self.region, self.blocks = region, blocks
        self.root = torch.from_numpy(region.root)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        theta = torch.from_numpy(self.region.center) + z @ self.root.T
        for block in self.blocks:
            assert torch.allclose(
                theta[:, block].sort(1).values, torch.eye(len(block)).double()[-1]
            )
        gain = torch.tensor([0.1, 0.7, -0.2, 0.3, 0.5], dtype=torch.float64)
        mean = torch.sin(0.6 * (theta[:, :5] @ gain) * (1 + theta[:, 5]))
        return mean, mean.square() + 0.1


def two_choices() -> DesignSpace:
    return DesignSpace(
        {"m": Choice(["A", "B", "C"]), "n": Choice(["P", "Q"]), "a": Parameter(0.4, 0.0, 1.0)}
    )


def test_relaxed_surrogate_is_the_mean_over_all_combinations() -> None:
    each = two_choices()
    region = Region(each.initial, np.diag(each.sigma**2))
    surrogate = Known(region, each.blocks)
    p, q, a = [0.2, 0.5, 0.3], [0.9, 0.1], 0.7
    expected = np.zeros(2)
    for i, j in itertools.product(range(3), range(2)):
        one_hot = np.array([*np.eye(3)[i], *np.eye(2)[j], a])
        z = torch.from_numpy(region.to_z(one_hot))[None]
        expected += p[i] * q[j] * np.array([float(part) for part in surrogate(z)])
    z = torch.from_numpy(region.to_z(np.array([*p, *q, a])))[None]
    relaxed = Relaxed(surrogate, region, each)
    assert np.allclose([float(part) for part in relaxed(z)], expected, rtol=1e-12)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: relaxed(t)[0], (z,))


def test_ascent_moves_the_weights_to_the_best_option() -> None:
    each = two_choices()
    theta = each.initial
    for _ in range(8):
        region = Region(theta, np.diag(each.sigma**2))
        step = ascend(Known(region, each.blocks), region, each, beta=0.0)
        assert step.gain >= 0
        theta = step.theta
    # sin rises up to π/2 > 0.6 (0.7 + 0.5)(1 + 1): the largest gains and the largest a are best
    assert each.as_dict(theta) == {"m": "B", "n": "Q", "a": 1.0}
    assert np.allclose(theta, each.concrete(theta), atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("initial", [None, "Pb", "W", "Fe"])
def test_best_material_wins_from_every_start(initial: str | None, seed: int) -> None:
    result = toy(space(initial), seed=seed)
    found = result.theta_dict
    assert found["m"] == "Fe"
    assert abs(found["a"] - 0.5) < 0.05
    nominal = result.history[0].theta[:3]
    assert MATERIALS[int(np.argmax(nominal))] == (initial or "Pb")
    for theta in (*result.points, *(each.theta for each in result.history)):
        assert sorted(theta[:3]) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("surrogate", ["ensemble", "mlp", "gp"])
def test_other_surrogates_find_it_too(surrogate: str) -> None:
    if surrogate == "gp":
        pytest.importorskip("botorch")
    assert toy(space("Pb"), surrogate=surrogate, iterations=8).theta_dict["m"] == "Fe"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "table",
    [
        [[0.3, 0.2], [0.5, 1.0], [0.4, 0.8]],  # one change after the other
        [[0.6, 0.2], [0.3, 1.0], [0.1, 0.4]],  # each change alone is a loss
        [[0.3, 0.2], [0.5, 1.0], [0.9, 0.4]],  # so it is at C P, which is better than the start
    ],
)
def test_two_choices_without_a_parameter(table: list[list[float]], seed: int) -> None:
    each = DesignSpace({"m": Choice(["A", "B", "C"]), "n": Choice(["P", "Q"])})
    objective = CallableObjective(
        lambda theta, x, y: float(theta[:3] @ np.array(table) @ theta[3:])
    )
    opt = Optimizer(each, objective, surrogate="quadratic", designs=16, events=1, seed=seed)
    for _ in range(10):
        for trial in opt.ask():
            opt.tell(trial, np.zeros(1), np.zeros(1))
        opt.step()
    assert opt.status == ""
    assert opt.result().theta_dict == {"m": "B", "n": "Q"}
    assert each.as_dict(opt.theta) == {"m": "B", "n": "Q"}


def test_constraints_of_the_parameters_hold() -> None:
    each = DesignSpace(
        {
            "m": Choice(MATERIALS),
            "a": Parameter(0.2, 0.0, 1.0),
            "b": Parameter(0.1, 0.0, 1.0),
        }
    )
    each.add_linear([0, 0, 0, 1.0, -2.0], 0.0, equal=True)
    each.add_constraint(lambda theta: theta[:, 3:].square().sum(1), 0.2)  # a at most 0.4
    result = toy(each, iterations=15)
    assert np.allclose(result.points[:, 3], 2 * result.points[:, 4], atol=1e-7)
    assert result.theta_dict["m"] == "Fe"
    assert abs(result.theta_dict["a"] - 0.4) < 0.01  # 0.5 without the constraint
    assert max(each.violation for each in result.history) <= 1e-3


def test_no_nominal_design_breaks_a_soft_constraint_on_a_choice() -> None:
    """Fe may be had for a below 0.2, W for up to 0.8: the nominal designs obey, whatever they are."""
    each = DesignSpace({"m": Choice(MATERIALS, "W"), "a": Parameter(0.5, 0.0, 1.0)})
    each.add_constraint(price, 0.8)
    result = toy(each)
    nominal = torch.tensor([record.theta for record in result.history], dtype=torch.float64)
    assert price(nominal).max() <= 0.8 * (1 + 1e-3)
    dear = DesignSpace({"m": Choice(MATERIALS, "Fe"), "a": Parameter(0.5, 0.0, 1.0)})
    dear.add_constraint(price, 0.8)
    with pytest.raises(InfeasibleDesign, match="initial"):
        toy(dear)


def test_executor_and_resumption_change_nothing(tmp_path: Path) -> None:
    whole = toy(space("Pb"), iterations=6)
    with ThreadPoolExecutor(3) as pool:
        threaded = toy(space("Pb"), iterations=6, executor=pool)
    toy(space("Pb"), iterations=3, checkpoint=tmp_path)
    resumed = toy(space("Pb"), iterations=6, checkpoint=tmp_path, resume=True)
    for other in (threaded, resumed):
        assert np.array_equal(whole.points, other.points)
        assert np.array_equal(whole.values, other.values)
        assert np.array_equal(whole.theta, other.theta)
        assert np.array_equal(whole.region.center, other.region.center)
    whole.save(tmp_path / "r.pt")
    assert OptimizeResult.load(tmp_path / "r.pt").theta_dict == whole.theta_dict


def test_spaces_copy_sample_and_have_a_width_that_stays() -> None:
    each = space("W")
    for other in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
        assert other.config() == each.config()
        assert other.choices == {"m": MATERIALS}
    drawn = each.sample(200)
    assert set(map(tuple, drawn[:, :3])) == set(map(tuple, np.eye(3)))
    assert each.as_dict(drawn[0]) == {"m": MATERIALS[drawn[0, :3].argmax()], "a": drawn[0, 3]}
    opt_sigma = toy(each).region.sigma
    assert np.allclose(opt_sigma[:3], 0.5, rtol=1e-12)
    assert opt_sigma[3] < 0.1


SPACE = """
[parameters.m]
options = ["Pb", "Fe", "W"]
initial = "Pb"
[parameters.a]
initial = 0.9
lower = 0.0
upper = 1.0
"""


def test_command_line(tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "space.toml"
    file.write_text(SPACE)
    assert load_space(file).config() == space("Pb").config()
    monkeypatch.chdir(HERE)
    folder = str(tmp_path / "run")
    tail = ["--method", "gaussian", "--surrogate", "quadratic", "--designs", "12", "--quiet"]
    run = ["run", "toy_simulators:materials", "--space", str(file), *tail, "--events", "200"]
    assert main([*run, "--checkpoint", folder, "--iterations", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["theta"]["m"] == "Fe"
    assert main(["resume", folder, "--iterations", "7", "--quiet"]) == 0
    assert f"{'m':20} Fe" in capsys.readouterr().out
    assert main(["report", folder]) == 0
    assert "m=Pb  m=Fe  m=W  a" in capsys.readouterr().out
    file.write_text(SPACE + "[parameters.n]\noptions = ['A']\n")
    assert main(run) == 2
    assert "parameter 'n'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Choice(["Pb"]), "'m': options must be two or more different"),
        (Choice([]), "'m': options must be two or more different"),
        (Choice(["Pb", "Fe", "Pb"]), "'m': options must be two or more different"),
        (Choice(["Pb", "Fe"], "W"), "'m': initial must be one of .*, got 'W'"),
        (Choice(["Pb", 3]), "'m': options must be a list of strings"),  # type: ignore[list-item]
        (Choice(5), "'m': options must be a list of strings, got 5"),  # type: ignore[arg-type]
        (Choice("PbFe"), "'m': options must be a list of strings"),
    ],
)
def test_bad_choices_name_the_parameter(bad: Choice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DesignSpace({"a": Parameter(0.5, 0, 1), "m": bad})


def test_other_bad_input() -> None:
    with pytest.raises(TypeError, match="'m' must be a Parameter or a Choice"):
        DesignSpace({"m": ["Pb", "Fe"]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"'m=Pb'.* twice"):
        DesignSpace({"m": Choice(["Pb", "Fe"]), "m=Pb": Parameter(0.5, 0, 1)})
    with pytest.raises(ValueError, match="at most 1000 combinations"):
        DesignSpace({f"m{i}": Choice(["A", "B"]) for i in range(10)})
    with pytest.raises(ValueError, match="cannot depend on a choice, a is not 0 for 'm=Fe'"):
        space().add_linear([0.0, 1.0, 0.0, 1.0], 1.0)
    with pytest.raises(ValueError, match="the surrogate is of 2 parameters"):
        toy(space(), surrogate=make_surrogate("quadratic", 2))
