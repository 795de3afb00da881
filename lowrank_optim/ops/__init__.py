"""The arithmetic of a step: lists in, lists out, by whichever backend serves."""

from lowrank_optim.ops.composite import (
    add_,
    lift_add_,
    lift_add_term_,
    matrix_norm,
    project,
    put_,
    stochastic_round,
    total_norms,
)
from lowrank_optim.ops.matrices import (
    column_norms,
    coordinate_adamw_,
    coordinate_add_,
    cosine_adamw_,
    cosine_lift_add_,
    cosine_project_,
    cosine_scores,
    fuses_cosine,
    lift_add_scaled_,
    lift_add_sign_,
    top_rows_,
)
from lowrank_optim.ops.moments import (
    Rows,
    adamw_direction_,
    dequantize,
    lion_direction_,
    moment_,
    quantize_,
)
from lowrank_optim.ops.noise import Noise
from lowrank_optim.ops.tiles import TILE_ELEMENTS

__all__ = [
    "TILE_ELEMENTS",
    "Noise",
    "Rows",
    "adamw_direction_",
    "add_",
    "column_norms",
    "coordinate_adamw_",
    "coordinate_add_",
    "cosine_adamw_",
    "cosine_lift_add_",
    "cosine_project_",
    "cosine_scores",
    "dequantize",
    "fuses_cosine",
    "lift_add_",
    "lift_add_scaled_",
    "lift_add_sign_",
    "lift_add_term_",
    "lion_direction_",
    "matrix_norm",
    "moment_",
    "project",
    "put_",
    "quantize_",
    "stochastic_round",
    "top_rows_",
    "total_norms",
]
