"""Study a trained model's trade-offs: evaluate a grid of preferences, measure and draw the front."""

from palora.core.simplex import evaluation_grid, simplex_grid
from palora.front.front import Front, evaluate
from palora.front.indicators import (
    hypervolume,
    nondominated,
    spearman,
    uniformity,
    uniformity_entropy,
)

__all__ = [
    "Front",
    "evaluate",
    "evaluation_grid",
    "hypervolume",
    "nondominated",
    "simplex_grid",
    "spearman",
    "uniformity",
    "uniformity_entropy",
]
