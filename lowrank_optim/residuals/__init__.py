"""What happens to the gradient outside the subspace: one file a member."""

from lowrank_optim.residuals.base import Forgetful, Measured, OneByOne, Residual, ResidualInputs
from lowrank_optim.residuals.drop import Drop
from lowrank_optim.residuals.error_feedback import ErrorFeedback
from lowrank_optim.residuals.free import Free
from lowrank_optim.residuals.scaled import Scaled

__all__ = [
    "Drop",
    "ErrorFeedback",
    "Forgetful",
    "Free",
    "Measured",
    "OneByOne",
    "Residual",
    "ResidualInputs",
    "Scaled",
]
