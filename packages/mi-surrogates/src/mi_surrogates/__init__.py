"""Design optimisation of black-box simulators with local mutual-information surrogates."""

from mi_surrogates.design import (
    Choice,
    DesignSpace,
    EnsembleSurrogate,
    GPSurrogate,
    MLPSurrogate,
    Parameter,
    QuadraticSurrogate,
)
from mi_surrogates.errors import (
    CheckpointLocked,
    CheckpointMismatch,
    DegenerateData,
    InfeasibleDesign,
    SimulationError,
    SurrogateError,
)
from mi_surrogates.information import MIEstimate, MutualInformation, mutual_information
from mi_surrogates.loop import (
    CallableObjective,
    Iteration,
    MIObjective,
    Objective,
    Optimizer,
    OptimizeResult,
    RecoObjective,
    Simulator,
    Trial,
    optimize,
)

__version__ = "0.1.0"

__all__ = [
    "CallableObjective",
    "CheckpointLocked",
    "CheckpointMismatch",
    "Choice",
    "DegenerateData",
    "DesignSpace",
    "EnsembleSurrogate",
    "GPSurrogate",
    "InfeasibleDesign",
    "Iteration",
    "MIEstimate",
    "MIObjective",
    "MLPSurrogate",
    "MutualInformation",
    "Objective",
    "OptimizeResult",
    "Optimizer",
    "Parameter",
    "QuadraticSurrogate",
    "RecoObjective",
    "SimulationError",
    "Simulator",
    "SurrogateError",
    "Trial",
    "mutual_information",
    "optimize",
]
