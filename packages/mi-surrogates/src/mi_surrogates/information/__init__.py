"""The information between two samples: bounds, estimators, networks."""

from mi_surrogates.information.bounds import (
    donsker_varadhan,
    infonce,
    js,
    log_mean_exp,
    mine_loss,
    nwj,
    smile,
)
from mi_surrogates.information.estimate import (
    MIEstimate,
    MutualInformation,
    Null,
    mutual_information,
)
from mi_surrogates.information.gaussian import cca_mi, gaussian_mi, gaussian_mi_from_cov
from mi_surrogates.information.knn import entropy_knn, ksg

__all__ = [
    "MIEstimate",
    "MutualInformation",
    "Null",
    "cca_mi",
    "donsker_varadhan",
    "entropy_knn",
    "gaussian_mi",
    "gaussian_mi_from_cov",
    "infonce",
    "js",
    "ksg",
    "log_mean_exp",
    "mine_loss",
    "mutual_information",
    "nwj",
    "smile",
]
