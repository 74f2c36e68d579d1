"""Problems whose information and best design are known, and the sensors on digits."""

from mi_surrogates.problems.base import Problem
from mi_surrogates.problems.channels import (
    CHANNELS,
    gaussian_information,
    linear_information,
    noisy_channel_information,
    saturating_information,
    uniform_information,
)
from mi_surrogates.problems.digits import DigitSensors
from mi_surrogates.problems.experiments import (
    EXPERIMENTS,
    DeathProcess,
    NoisyRosenbrock,
    SensorRing,
    ThreeHump,
    regression_information,
)

PROBLEMS: dict[str, Problem] = {each.name: each for each in [*CHANNELS, *EXPERIMENTS]}

__all__ = [
    "PROBLEMS",
    "DeathProcess",
    "DigitSensors",
    "NoisyRosenbrock",
    "Problem",
    "SensorRing",
    "ThreeHump",
    "gaussian_information",
    "linear_information",
    "noisy_channel_information",
    "regression_information",
    "saturating_information",
    "uniform_information",
]
