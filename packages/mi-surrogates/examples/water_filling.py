"""Share a power of 2 among four Gaussian channels: the known answer is water-filling, (1, 0.75, 0.25, 0)."""

from __future__ import annotations

import numpy as np

from mi_surrogates import MIObjective, optimize
from mi_surrogates.problems import PROBLEMS

problem = PROBLEMS["water_filling"]
result = optimize(
    problem.simulator,
    problem.make_space(),
    MIObjective("gaussian"),
    surrogate="quadratic",
    iterations=20,
)
print("powers", np.round(result.theta, 3), "known optimum", problem.theta)
print(f"exact information {problem.information(result.theta):.4f} of {problem.best:.4f} nats")
