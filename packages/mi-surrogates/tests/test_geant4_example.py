"""The Geant4 example against a stand-in that does what the example asks of `geant4_pybind`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mi_surrogates.simulators import Geant4Simulator

EXAMPLE = Path(__file__).parents[1] / "examples" / "geant4" / "calorimeter.py"
THETA = np.array([20.0, 5.0, 10.0, 15.0, 0.05, 49.95])


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("geant4_calorimeter", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delitem(sys.modules, "fake_pybind", raising=False)
    import fake_pybind

    fake_pybind.PLACED.clear()
    fake_pybind.SHOT.clear()
    return fake_pybind


def test_layers_touch_and_deposits_belong_to_scintillators(
    example: ModuleType, fake: ModuleType
) -> None:
    x, y = example.build(fake, THETA, 50, 3)
    assert x.shape == (50, 1)
    assert x.min() >= 1
    assert x.max() <= 20
    *layers, world = fake.PLACED
    assert world.mother is None
    assert [each.copy for each in layers] == [0, 1, 2, 3, 4, 5]
    assert [each.material for each in layers] == ["G4_Pb", "G4_PbWO4"] * 3
    low = np.array([each.z - each.half for each in layers])
    high = np.array([each.z + each.half for each in layers])
    np.testing.assert_allclose(high - low, THETA, atol=1e-12)
    np.testing.assert_allclose(low[1:], high[:-1], atol=1e-12)
    assert world.half > high[-1]
    assert fake.SHOT[0][2] < low[0]  # the gun stands before the first layer
    # the stand-in spreads the energy over the layers by thickness, in two steps each
    np.testing.assert_allclose(y, x * THETA[1::2] / THETA.sum(), rtol=1e-12)
    assert {name for name, *_ in fake.SHOT} == {"gamma", "pi+"}
    np.testing.assert_allclose([energy for _, energy, _ in fake.SHOT], 1000 * x[:, 0])
    again, _ = example.build(fake, THETA, 50, 3)
    assert (again == x).all()


def test_example_runs_through_the_adapter_in_a_process_of_its_own(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("G4EMLOW8.8", "G4PARTICLEXS4.2", "G4ENSDFSTATE3.0", "PhotonEvaporation6.1.2"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GEANT4_DATA_DIR", str(tmp_path))
    # a spawned process finds modules by name
    monkeypatch.setitem(sys.modules, "calorimeter", example)
    monkeypatch.setattr(example.build, "__module__", "calorimeter")
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    x, y = Geant4Simulator(example.build, module="fake_pybind")(THETA, 5, 1)
    np.testing.assert_allclose(y, x * THETA[1::2] / THETA.sum(), rtol=1e-12)


def test_space_of_the_example_is_that_of_the_sibling_framework(example: ModuleType) -> None:
    space = example.make_space()
    assert space.dim == 6
    assert space.violation(space.initial) == 0
    assert space.project(np.full(6, 100.0)).sum() == pytest.approx(200.0)
