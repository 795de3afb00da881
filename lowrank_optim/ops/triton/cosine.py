"""Cosine transforms: cuFFT through torch."""

from lowrank_optim.ops.cosine import (  # noqa: F401  (not yet kernels)
    cosine_adamw_,
    cosine_lift_add_,
    cosine_project_,
    cosine_scores,
)
from lowrank_optim.ops.reference import top_rows_  # noqa: F401
