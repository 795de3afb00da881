"""Every op in plain torch, on every device: what the accelerated versions are tested against.

The cosines are in :mod:`lowrank_optim.ops.cosine`, beside their transform.
"""

from lowrank_optim.ops.cosine import (
    cosine_adamw_,
    cosine_lift_add_,
    cosine_project_,
    cosine_scores,
)
from lowrank_optim.ops.reference.factors import (
    count_,
    decay_,
    direction_add_,
    limited_,
    residual_factors_,
    row_steps_,
    scaled_squares,
)
from lowrank_optim.ops.reference.matrices import (
    addmm_,
    column_norms,
    coordinate_adamw_,
    coordinate_add_,
    cosine_top_project_,
    lift_add_scaled_,
    lift_add_sign_,
    move_rows_,
    top_rows_,
)
from lowrank_optim.ops.reference.moments import (
    adamw_direction_,
    adamw_direction_8bit_,
    lion_direction_,
    lion_direction_8bit_,
    moment_,
    moment_8bit_,
)
from lowrank_optim.ops.reference.storage import (
    dequantize_blockwise_,
    keep_positive_,
    quantize_blockwise_,
    stochastic_round_,
)
from lowrank_optim.ops.reference.turns import row_dots_, step_rows_, turn_rows_

__all__ = [
    "adamw_direction_",
    "adamw_direction_8bit_",
    "addmm_",
    "column_norms",
    "coordinate_adamw_",
    "coordinate_add_",
    "cosine_adamw_",
    "cosine_lift_add_",
    "cosine_project_",
    "cosine_scores",
    "cosine_top_project_",
    "count_",
    "decay_",
    "dequantize_blockwise_",
    "direction_add_",
    "keep_positive_",
    "lift_add_scaled_",
    "lift_add_sign_",
    "limited_",
    "lion_direction_",
    "lion_direction_8bit_",
    "moment_",
    "moment_8bit_",
    "move_rows_",
    "quantize_blockwise_",
    "residual_factors_",
    "row_dots_",
    "row_steps_",
    "scaled_squares",
    "step_rows_",
    "stochastic_round_",
    "top_rows_",
    "turn_rows_",
]
