"""The calorimeter's physics, executables and a fake Geant4."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from geant4_build import build

import mi_surrogates.simulators.command as command_module
from mi_surrogates.errors import Geant4DataMissing, MissingExtra
from mi_surrogates.simulators import (
    MATERIALS,
    CommandSimulator,
    Geant4Simulator,
    Material,
    SamplingCalorimeter,
)
from mi_surrogates.simulators.calorimeter import fractions, shower_parameters
from mi_surrogates.simulators.geant4 import _work, check_data

LEAD = MATERIALS["Pb"]
CONTAINED = {  # at 10, 15, 20 and 25 radiation lengths of lead
    1.0: [0.819, 0.949, 0.984, 0.994],
    10.0: [0.683, 0.912, 0.979, 0.995],
    100.0: [0.494, 0.823, 0.952, 0.989],
}


@pytest.mark.parametrize("energy", [10.0, 100.0])
def test_mean_containment_in_lead_is_the_table(energy: float) -> None:
    """Spreads not clamped, as in the table."""
    edges = np.array([10.0, 15.0, 20.0, 25.0])
    shares = fractions(
        np.full(40_000, energy), edges, LEAD.critical, LEAD.z, np.random.default_rng(0), clamp=False
    )
    inside = np.cumsum(shares, 1)[:, :4].mean(0)
    assert inside.tolist() == pytest.approx(CONTAINED[energy], abs=0.003)


def test_mean_containment_at_one_gev_is_the_table() -> None:
    edges = np.array([10.0, 15.0, 20.0, 25.0])
    shares = fractions(
        np.full(40_000, 1.0), edges, LEAD.critical, LEAD.z, np.random.default_rng(0), clamp=False
    )
    inside = np.cumsum(shares, 1)[:, :4].mean(0)
    assert inside.tolist() == pytest.approx(CONTAINED[1.0], abs=0.003)


def test_shares_and_leakage_are_everything() -> None:
    rng = np.random.default_rng(0)
    shares = fractions(rng.uniform(1, 20, 1000), np.array([1.0, 5.0, 9.0]), 7.43, 82.0, rng)
    assert np.allclose(shares.sum(1), 1, atol=1e-14)
    assert (shares >= 0).all()


def test_shower_maximum_grows_as_the_logarithm_of_the_energy() -> None:
    energies = np.array([10.0, 100.0, 1000.0])
    depth = np.exp(shower_parameters(energies, LEAD.critical, LEAD.z).log_t)
    assert np.diff(depth).tolist() == pytest.approx([np.log(10)] * 2, rel=1e-12)


def resolutions(calo: SamplingCalorimeter, theta: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """σ/E of the calibrated sum at fixed energies."""
    rng = np.random.default_rng(0)
    found = []
    for energy in energies:
        total = calo.respond(theta, np.full(40_000, energy), rng).sum(1)
        found.append(total.std() / total.mean())
    return np.array(found)


def test_resolution_is_a_stochastic_a_constant_and_a_noise_term() -> None:
    """Deep enough that leakage is small; all three squared terms come out positive."""
    calo = SamplingCalorimeter(["Pb", "polystyrene"] * 30, noise=30.0)
    theta = np.tile([5.612, 5.0], 30)
    energies = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    measured = resolutions(calo, theta, energies) ** 2
    columns = np.stack([1 / energies, np.ones(5), 1 / energies**2], 1)
    terms = np.linalg.lstsq(columns / measured[:, None], np.ones(5), rcond=None)[0]
    assert (terms > 0).all()
    assert np.abs(columns @ terms / measured - 1).max() < 0.06
    # 20 %/√E at one radiation length of lead, by the rule that the model is built on
    assert np.sqrt(terms[0]) == pytest.approx(0.2, abs=0.03)


def test_more_light_makes_the_resolution_better() -> None:
    theta, energies = np.array([0.05, 60.0] * 3), np.array([1.0, 2.0])
    dark, bright = (
        resolutions(
            SamplingCalorimeter(["Pb", "PbWO4"] * 3, light=light, noise=0.0), theta, energies
        )
        for light in (0.05, 2.0)
    )
    assert (bright < dark).all()


def test_start_of_the_demo_has_the_known_resolution() -> None:
    loss, resolution = SamplingCalorimeter(["Pb", "PbWO4"] * 3).judge(np.array([20.0, 5.0] * 3))
    assert loss == pytest.approx(0.164, abs=0.01)
    assert resolution == pytest.approx(0.17, abs=0.01)


def test_lead_and_plastic_has_an_interior_optimum() -> None:
    calo = SamplingCalorimeter(["Pb", "polystyrene"] * 3)
    middle, none = (calo.judge(np.array(t * 3))[0] for t in ([30.0, 30.0], [1.0, 65.0]))
    assert middle == pytest.approx(0.165, abs=0.02)
    assert none == pytest.approx(3.15, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_and_numpy_events_have_the_same_moments(dtype: torch.dtype) -> None:
    calo, theta, n = SamplingCalorimeter(["Pb", "PbWO4"] * 3), np.array([10.0, 20.0] * 3), 100_000
    x, y = calo.torch_events(theta, n, torch.Generator().manual_seed(0), dtype=dtype)
    x0, y0 = calo(theta, n, 0)
    assert x.dtype == y.dtype == dtype
    assert y.shape == y0.shape
    # standard errors of the means are 0.2 to 0.4 %, of the deviations up to 0.4 %
    assert np.allclose(y.mean(0), y0.mean(0), rtol=0.015)
    assert np.allclose(y.std(0), y0.std(0), rtol=0.02)
    assert float(x.mean()) == pytest.approx(x0.mean(), rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SamplingCalorimeter(["Pb"]), "absorber and scintillator in turn"),
        (lambda: SamplingCalorimeter(["Pb", "Au"]), "Pb, Fe, W"),
        (lambda: SamplingCalorimeter(["Pb", "LYSO"], energies=(5.0, 1.0)), "energies"),
        (lambda: SamplingCalorimeter(["Pb", "LYSO"])(np.ones(3), 5, 0), "2 thicknesses"),
        (lambda: SamplingCalorimeter(["Pb", "LYSO"])(np.array([-1.0, 1.0]), 5, 0), "at least 0"),
    ],
)
def test_bad_calorimeters_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_materials_can_be_the_users_own() -> None:
    calo = SamplingCalorimeter([Material(10.0, 10.0, 1.0, 50.0), "LYSO"])
    assert calo(np.array([1.0, 100.0]), 50, 0)[1].shape == (50, 1)


WRITER = """
import json, sys
import numpy as np
given = json.load(open(sys.argv[1]))
n, a, b = given["n"], given["theta"]["a"], given["theta"]["b"]
x = np.random.default_rng(given["seed"]).random(n)
table = {"x": x, "y": a * x, "z": b + x}
kind, out = sys.argv[3], sys.argv[2]
if kind == "npz":
    np.savez(out, x=x, y=np.stack([a * x, b + x], 1))
elif kind == "csv":
    np.savetxt(out, np.stack(list(table.values()), 1), delimiter=",", header="x, y, z", comments="")
elif kind == "parquet":
    import pandas
    pandas.DataFrame(table).to_parquet(out)
elif kind == "sleep":
    import time
    time.sleep(30)
elif kind == "fail":
    sys.stderr.write("no beam")
    sys.exit(3)
"""


def writer(kind: str, **options) -> CommandSimulator:
    return CommandSimulator(
        [sys.executable, "-c", WRITER, "{theta}", "{out}", kind], ["a", "b"], **options
    )


@pytest.mark.parametrize("kind", ["npz", "csv", "parquet"])
def test_programs_write_events_in_every_format(kind: str) -> None:
    run = writer(kind, output=kind, y="y" if kind == "npz" else ["y", "z"])
    x, y = run(np.array([2.0, 5.0]), 20, 7)
    assert np.allclose(x[:, 0], np.random.default_rng(7).random(20))
    assert np.allclose(y, np.stack([2 * x[:, 0], 5 + x[:, 0]], 1))


def test_shell_script_gets_numbers_and_variables(tmp_path: Path) -> None:
    script = tmp_path / "sim.sh"
    script.write_text(
        'printf "x,y\\n" > "$1"; for i in $(seq $2); do echo "$i,$BIAS" >> "$1"; done'
    )
    run = CommandSimulator(
        ["sh", str(script), "{out}", "{n}"], ["a"], output="csv", env={"BIAS": "4"}
    )
    x, y = run(np.array([1.0]), 3, 0)
    assert x.ravel().tolist() == [1, 2, 3]
    assert y.ravel().tolist() == [4, 4, 4]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_timeout_kills_what_a_wrapper_script_started(tmp_path: Path) -> None:
    script, note = tmp_path / "wrap.sh", tmp_path / "pid"
    script.write_text('sleep 60 & echo $! > "$1"; wait')
    run = CommandSimulator(["sh", str(script), str(note), "{out}"], ["a"], timeout=2.0)
    with pytest.raises(TimeoutError, match="killed after 2 s"):
        run(np.array([1.0]), 3, 0)
    child = Path(f"/proc/{note.read_text().strip()}")
    if not Path("/proc").is_dir():
        pytest.skip("no /proc to look into")
    # killed: gone, or a zombie until its new parent collects it
    assert not child.exists() or (child / "stat").read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (writer("fail"), RuntimeError, "status 3: no beam"),
        (writer("nothing"), RuntimeError, "wrote no events.npz"),
        (writer("sleep", timeout=0.5), TimeoutError, "killed after 0.5 s"),
        (writer("csv", output="csv", y="w"), KeyError, "no column 'w', only x, y, z"),
    ],
)
def test_programs_that_fail_say_how(run: CommandSimulator, error, message: str) -> None:
    with pytest.raises(error, match=message):
        run(np.array([1.0, 1.0]), 4, 0)


def test_bad_commands_are_named() -> None:
    with pytest.raises(ValueError, match="output must be one of"):
        CommandSimulator(["a", "{out}"], ["a"], output="hdf5")
    with pytest.raises(ValueError, match="list of arguments"):
        CommandSimulator(["a"], ["a"])
    with pytest.raises(ValueError, match="npz, csv"):
        command_module.read_events(Path("a.txt"), ["x"], ["y"])


def test_root_files_go_through_uproot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.root"
    monkeypatch.setitem(sys.modules, "uproot", None)
    with pytest.raises(MissingExtra, match="root"):
        command_module.read_events(path, ["x"], ["y"])

    class Tree:
        def arrays(self, library: str) -> dict[str, np.ndarray]:
            return {"x": np.ones(3), "y": np.zeros(3)}

    class File(dict):
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

    fake = type(sys)("uproot")
    fake.open = lambda _: File(hits=Tree())
    monkeypatch.setitem(sys.modules, "uproot", fake)
    assert command_module.read_events(path, ["x"], ["y"], "hits")[0].shape == (3, 1)


def test_parquet_without_pandas_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pandas is not None
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match="parquet"):
        command_module.read_events(Path("a.parquet"), ["x"], ["y"])


FAKE = """
class G4Random:
    seed = None
    @classmethod
    def setTheSeed(cls, seed):
        cls.seed = seed
"""


@pytest.fixture
def geant4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake module and empty data sets."""
    (tmp_path / "fake_geant4.py").write_text(FAKE)
    for name in ("G4EMLOW8.8", "G4PARTICLEXS4.2", "G4ENSDFSTATE3.0", "PhotonEvaporation6.1.2"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GEANT4_DATA_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


class Pipe:
    sent: tuple | None = None

    def send(self, what: tuple) -> None:
        self.sent = what


@pytest.mark.usefixtures("geant4")
def test_geant4_runs_each_design_in_a_seeded_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Geant4Simulator(build, module="fake_geant4")
    x, y = run(np.array([3.0]), 4, 11)
    assert x.tolist() == [11] * 4
    assert (y == 3).all()
    assert "fake_geant4" not in sys.modules
    with pytest.raises(RuntimeError, match="negative thickness"):
        run(np.array([-1.0]), 4, 11)
    with pytest.raises(RuntimeError, match="died with status 7"):
        run(np.array([60.0]), 4, 11)
    with pytest.raises(TimeoutError, match=r"killed after 0\.1 s"):
        Geant4Simulator(build, module="fake_geant4", timeout=0.1)(np.array([30.0]), 4, 11)
    monkeypatch.setitem(sys.modules, "no_such_geant4", None)
    pipe = Pipe()
    _work(pipe, build, "no_such_geant4", np.ones(1), 4, 11)
    assert pipe.sent == ("missing", None)


def test_geant4_data_are_checked_before_the_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GEANT4_DATA_DIR", raising=False)
    for variable in ("G4LEDATA", "G4PARTICLEXSDATA", "G4ENSDFSTATEDATA", "G4LEVELGAMMADATA"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(Geant4DataMissing, match=r"curl -L .*G4EMLOW\.8\.8"):
        Geant4Simulator(build)(np.array([1.0]), 1, 0)
    with pytest.raises(Geant4DataMissing, match="G4PARTICLEXS, G4ENSDFSTATE, Photon"):
        check_data({"G4LEDATA": str(tmp_path)})
