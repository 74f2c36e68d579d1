"""Simulators: a shipped calorimeter, any executable, Geant4."""

from mi_surrogates.simulators.calorimeter import MATERIALS, Material, SamplingCalorimeter
from mi_surrogates.simulators.command import CommandSimulator
from mi_surrogates.simulators.geant4 import Geant4Simulator

__all__ = ["MATERIALS", "CommandSimulator", "Geant4Simulator", "Material", "SamplingCalorimeter"]
