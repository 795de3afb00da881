"""The ops of csrc, through ctypes: `liblowrank_optim.so` on the CPU, its CUDA half on a GPU.

The library knows nothing of torch; this package turns lists of tensors into arrays of pointers. One
call serves a whole list. float64 raises TypeError: it is served by the reference.
"""

from lowrank_optim.ops.native.coordinate import coordinate_adamw_, coordinate_add_
from lowrank_optim.ops.native.cosine import (
    cosine_adamw_,
    cosine_lift_add_,
    cosine_project_,
    cosine_scores,
    takes_length,
    top_rows_,
)
from lowrank_optim.ops.native.lift import lift_add_scaled_, lift_add_sign_
from lowrank_optim.ops.native.loader import available, isa
from lowrank_optim.ops.native.moments import (
    adamw_direction_,
    adamw_direction_8bit_,
    lion_direction_,
    lion_direction_8bit_,
    moment_,
    moment_8bit_,
)
from lowrank_optim.ops.native.norms import column_norms
from lowrank_optim.ops.native.storage import (
    dequantize_blockwise_,
    quantize_blockwise_,
    stochastic_round_,
)
from lowrank_optim.ops.reference import (  # of few numbers, or no kernel on the CPU
    addmm_,
    cosine_top_project_,
    count_,
    decay_,
    direction_add_,
    move_rows_,
    residual_factors_,
    row_dots_,
    row_steps_,
    step_rows_,
    turn_rows_,
)

__all__ = [
    "adamw_direction_",
    "adamw_direction_8bit_",
    "addmm_",
    "available",
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
    "isa",
    "lift_add_scaled_",
    "lift_add_sign_",
    "lion_direction_",
    "lion_direction_8bit_",
    "moment_",
    "moment_8bit_",
    "move_rows_",
    "quantize_blockwise_",
    "residual_factors_",
    "row_dots_",
    "row_steps_",
    "step_rows_",
    "stochastic_round_",
    "takes_length",
    "top_rows_",
    "turn_rows_",
]
