"""The op vocabulary. The only module that knows how an op is computed."""

from lowrank_optim.ops.reference import (
    TILE_ELEMENTS,
    adamw_direction_,
    add_,
    lift_add_,
    matrix_norm,
    project,
    stochastic_round,
)

__all__ = [
    "TILE_ELEMENTS",
    "adamw_direction_",
    "add_",
    "lift_add_",
    "matrix_norm",
    "project",
    "stochastic_round",
]
