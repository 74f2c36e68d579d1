"""A sampling calorimeter in Geant4, three absorbers and three scintillators, optimised by information.

`python examples/geant4/calorimeter.py --checkpoint run/ --workers 8`; README.md beside this file has the
data sets that Geant4 needs. Photons and positive pions of 1 to 20 GeV, half of each, fly along z into the
layers; y is the energy deposited in each scintillator, in GeV.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mi_surrogates import DesignSpace, Parameter, optimize
from mi_surrogates.simulators import Geant4Simulator

LAYERS = 3
ABSORBER, SCINTILLATOR = "G4_Pb", "G4_PbWO4"
WIDTH, MARGIN, WORLD = 500.0, 100.0, 1000  # mm, mm, copy number of what is no layer


def build(g4: Any, theta: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Build the layers of thickness theta (mm), shoot n particles, return energies and deposits.

    Args:
        g4: the module `geant4_pybind`, its engine seeded.
        theta: (6,) absorber, scintillator, absorber, ...
        n: events.
        seed: of the particles; the showers follow the engine.

    Returns:
        x (n, 1) energies and y (n, 3) deposits, GeV.
    """
    rng = np.random.default_rng(seed)
    energies, pions = rng.uniform(1, 20, n), rng.random(n) < 0.5
    deposits = np.zeros((n, len(theta)))
    event = [-1]

    class Detector(g4.G4VUserDetectorConstruction):  # type: ignore[name-defined, misc]
        def Construct(self) -> Any:
            find = g4.G4NistManager.Instance().FindOrBuildMaterial
            depth = float(np.sum(theta))
            self.kept = []  # Geant4 does not own what Python made

            def block(name: str, size: float, material: str) -> Any:
                solid = g4.G4Box(name, WIDTH / 2, WIDTH / 2, size / 2)
                logical = g4.G4LogicalVolume(solid, find(material), name)
                self.kept += [solid, logical]
                return logical

            def place(logical: Any, z: float, mother: Any, copy: int) -> Any:
                where = g4.G4ThreeVector(0.0, 0.0, z)
                placed = g4.G4PVPlacement(None, where, logical, "layer", mother, False, copy)
                self.kept.append(placed)
                return placed

            world = block("world", depth + 2 * MARGIN, "G4_Galactic")
            front = -depth / 2
            for i, size in enumerate(theta):
                material = SCINTILLATOR if i % 2 else ABSORBER
                place(block(f"layer{i}", float(size), material), front + size / 2, world, i)
                front += float(size)
            return place(world, 0.0, None, WORLD)

    class Gun(g4.G4VUserPrimaryGeneratorAction):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.gun = g4.G4ParticleGun(1)
            self.gun.SetParticleMomentumDirection(g4.G4ThreeVector(0.0, 0.0, 1.0))
            z = -float(np.sum(theta)) / 2 - MARGIN / 2
            self.gun.SetParticlePosition(g4.G4ThreeVector(0.0, 0.0, z))

        def GeneratePrimaries(self, primary: Any) -> None:
            event[0] += 1
            name = "pi+" if pions[event[0]] else "gamma"
            found = g4.G4ParticleTable.GetParticleTable().FindParticle(name)
            self.gun.SetParticleDefinition(found)
            self.gun.SetParticleEnergy(energies[event[0]] * g4.GeV)
            self.gun.GeneratePrimaryVertex(primary)

    class Steps(g4.G4UserSteppingAction):  # type: ignore[name-defined, misc]
        def UserSteppingAction(self, step: Any) -> None:
            if (deposit := step.GetTotalEnergyDeposit()) > 0:
                copy = step.GetPreStepPoint().GetTouchable().GetVolume().GetCopyNo()
                if copy < len(theta):
                    deposits[event[0], copy] += deposit / g4.GeV

    class Actions(g4.G4VUserActionInitialization):  # type: ignore[name-defined, misc]
        def Build(self) -> None:
            self.SetUserAction(Gun())
            self.SetUserAction(Steps())

    physics = g4.FTFP_BERT()
    physics.SetVerboseLevel(0)
    manager = g4.G4RunManagerFactory.CreateRunManager(g4.G4RunManagerType.Serial)
    manager.SetUserInitialization(Detector())
    manager.SetUserInitialization(physics)
    manager.SetUserInitialization(Actions())
    manager.Initialize()
    manager.BeamOn(n)
    return energies[:, None], deposits[:, 1::2]


def make_space() -> DesignSpace:
    """Return the space of the six thicknesses, 200 mm in all."""
    space = DesignSpace(
        {
            f"{kind}{i}": Parameter(20.0 if kind == "absorber" else 5.0, 0.05, 100.0, sigma=2.5)
            for i in range(LAYERS)
            for kind in ("absorber", "scintillator")
        }
    )
    space.add_linear([1.0] * (2 * LAYERS), upper=200.0)
    return space


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, help="folder of the run; the same one resumes"
    )
    parser.add_argument("--objective", choices=("mi", "reco"), default="mi")
    parser.add_argument("--designs", type=int, default=20)
    parser.add_argument("--events", type=int, default=400)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # every design runs in a process of its own, so that threads are enough to wait for them
    with ThreadPoolExecutor(arguments.workers) as pool:
        result = optimize(
            Geant4Simulator(build),
            make_space(),
            arguments.objective,
            designs=arguments.designs,
            events=arguments.events,
            iterations=arguments.iterations,
            executor=pool,
            checkpoint=arguments.checkpoint,
            seed=arguments.seed,
        )
    for name, value in result.theta_dict.items():
        print(f"{name:15} {value:7.2f} mm")
    print(f"{result.value:.3f} ± {result.stderr:.3f} after {result.events} events")


if __name__ == "__main__":
    main()
