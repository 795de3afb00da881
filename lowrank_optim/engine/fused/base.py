"""What fused steps have in common: when one may be taken, and its counters."""

from __future__ import annotations

import math

from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import Bucket, warn_skipped
from lowrank_optim.engine.draws import rounds
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import Drop, Free
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.stores import FloatStore
from lowrank_optim.tensors.projected_grad import ProjectedGrad


def is_plain(bucket: Bucket) -> bool:
    """Whether factors are numbers on the host, moments and weights are updated where they are.

    A fused step branches on the host, reads gradients as they are stored, and writes W once.
    """
    chosen, param = bucket.chosen, bucket.items[0].param
    part = bucket.items[0].part
    if part is not None and part.sharded:
        return False
    plain = type(chosen.rule) is AdamW and type(chosen.residual) in (Drop, Free)
    rounded = rounds(bucket.items[0], chosen)
    if not plain or rounded or chosen.maximize or isinstance(bucket.lr, Tensor):
        return False
    if type(chosen.store) is not FloatStore or on_accelerator(param):
        return False
    return all(_is_stored_so(item) for item in bucket.items)


def _is_stored_so(item: ParamPlan) -> bool:
    """Whether its matrix is a view of the parameter, and its gradient a whole one."""
    assert item.view is not None
    whole = not isinstance(item.param.grad, ProjectedGrad)
    return whole and item.view.shares(item.param, item.view.of(item.param))


def is_finite(item: ParamPlan, grad: Tensor) -> bool:
    """Whether a gradient is finite; else its step is skipped, and the log says so."""
    finite = math.isfinite(ops.total_norms([grad])[0])
    if not finite:
        warn_skipped(item)
    return finite


def time_of(state: State, chosen: Strategies) -> float:
    """Steps that the moments have seen, the one being taken included and counted already."""
    last = max(int(state["refresh_step"]), 0)
    return float(state["step"]) - (last if chosen.on_refresh == "reset" else 0)
