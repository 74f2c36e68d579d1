"""A detector for the fake Geant4; light, since a spawned process imports it."""

from __future__ import annotations

import os

import numpy as np


def build(g4, theta: np.ndarray, n: int, seed: int):
    if theta[0] < 0:
        raise ValueError("negative thickness")
    if theta[0] > 50:
        os._exit(7)
    return np.full(n, g4.G4Random.seed), np.full((n, 2), theta[0])
