"""Toy games with known solutions, and a runner for every method of the paper."""

from lookahead_minmax.games.base import Game
from lookahead_minmax.games.run import Trajectory, run
from lookahead_minmax.games.zoo import (
    Bilinear,
    Covariance,
    DiracGAN,
    Linear,
    MatrixGame,
    Polymatrix,
    Quadratic,
    StochasticBilinear,
)

__all__ = [
    "Bilinear",
    "Covariance",
    "DiracGAN",
    "Game",
    "Linear",
    "MatrixGame",
    "Polymatrix",
    "Quadratic",
    "StochasticBilinear",
    "Trajectory",
    "run",
]
