"""A stand-in for `geant4_pybind`: boxes in a row share the particle's energy by thickness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GeV = 1000.0
PLACED: list[G4PVPlacement] = []
SHOT: list[tuple[str, float, float]] = []  # particle, energy in MeV, z of the gun


class G4Random:
    @staticmethod
    def setTheSeed(seed: int) -> None: ...


@dataclass
class G4ThreeVector:
    x: float
    y: float
    z: float


@dataclass
class G4Box:
    name: str
    x: float
    y: float
    z: float


@dataclass
class G4LogicalVolume:
    solid: G4Box
    material: str
    name: str


class G4PVPlacement:
    def __init__(
        self,
        rotation: None,
        where: G4ThreeVector,
        logical: G4LogicalVolume,
        name: str,
        mother: G4LogicalVolume | None,
        many: bool,
        copy: int,
    ) -> None:
        assert rotation is None
        assert not many
        self.z, self.half, self.material = where.z, logical.solid.z, logical.material
        self.mother, self.copy = mother, copy
        PLACED.append(self)

    def GetCopyNo(self) -> int:
        return self.copy


class G4NistManager:
    @staticmethod
    def Instance() -> G4NistManager:
        return G4NistManager()

    def FindOrBuildMaterial(self, name: str) -> str:
        return name


class G4ParticleTable:
    @staticmethod
    def GetParticleTable() -> G4ParticleTable:
        return G4ParticleTable()

    def FindParticle(self, name: str) -> str:
        return name


class G4ParticleGun:
    def __init__(self, number: int) -> None:
        assert number == 1

    def SetParticleMomentumDirection(self, direction: G4ThreeVector) -> None:
        assert (direction.x, direction.y, direction.z) == (0, 0, 1)

    def SetParticlePosition(self, where: G4ThreeVector) -> None:
        self.z = where.z

    def SetParticleDefinition(self, particle: str) -> None:
        self.particle = particle

    def SetParticleEnergy(self, energy: float) -> None:
        self.energy = energy

    def GeneratePrimaryVertex(self, event: list[float]) -> None:
        event.append(self.energy)
        SHOT.append((self.particle, self.energy, self.z))


class G4VUserDetectorConstruction:
    pass


class G4VUserPrimaryGeneratorAction:
    pass


class G4UserSteppingAction:
    pass


class G4VUserActionInitialization:
    def __init__(self) -> None:
        self.actions: list[Any] = []

    def SetUserAction(self, action: Any) -> None:
        self.actions.append(action)


class FTFP_BERT:
    def SetVerboseLevel(self, level: int) -> None: ...


class Step:
    """A step, its point before and its touchable in one."""

    def __init__(self, volume: G4PVPlacement, deposit: float) -> None:
        self.volume, self.deposit = volume, deposit

    def GetTotalEnergyDeposit(self) -> float:
        return self.deposit

    def GetPreStepPoint(self) -> Step:
        return self

    def GetTouchable(self) -> Step:
        return self

    def GetVolume(self) -> G4PVPlacement:
        return self.volume


class G4RunManagerType:
    Serial = 0


class Manager:
    def __init__(self) -> None:
        self.parts: list[Any] = []

    def SetUserInitialization(self, part: Any) -> None:
        self.parts.append(part)

    def Initialize(self) -> None:
        detector, physics, actions = self.parts
        assert isinstance(physics, FTFP_BERT)
        self.start = len(PLACED)
        detector.Construct()
        actions.Build()
        self.gun, self.steps = actions.actions

    def BeamOn(self, n: int) -> None:
        layers = [each for each in PLACED[self.start :] if each.mother is not None]
        depth = sum(2 * each.half for each in layers)
        for _ in range(n):
            event: list[float] = []
            self.gun.GeneratePrimaries(event)
            for layer in PLACED[self.start :]:  # the world, too: its deposits belong to no layer
                part = event[0] * layer.half / depth
                for _ in range(2):
                    self.steps.UserSteppingAction(Step(layer, part))
                self.steps.UserSteppingAction(Step(layer, 0.0))


class G4RunManagerFactory:
    @staticmethod
    def CreateRunManager(kind: int) -> Manager:
        assert kind == G4RunManagerType.Serial
        return Manager()
