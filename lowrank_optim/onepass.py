"""AdamW on rows or whole tensors in one pass over W and G, where the host can look at a gradient.

What the phases of a step do in turn (coordinates, directions, apply), without a buffer between
them: the same numbers, as the arithmetic of each element is the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.plan import Item, State, Strategies, branchless, slot_key
from lowrank_optim.projected import ProjectedGrad
from lowrank_optim.refresh import basis_due, refresh_
from lowrank_optim.residuals import Drop, Free, Seen
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.stores import FloatStore
from lowrank_optim.subspaces.coordinate import FREE, Coordinates

logger = logging.getLogger(__name__)


def takes(
    items: Sequence[Item], states: Sequence[State], chosen: Strategies, lr: float | Tensor
) -> bool:
    """Whether a bucket of rows can be stepped so."""
    if not isinstance(items[0].subspace, Coordinates) or not _plain(chosen, items[0].param, lr):
        return False
    kept = states[0][slot_key("low", "exp_avg")].dtype
    return kept == compute_dtype(items[0].param.dtype) and all(_stored(item) for item in items)


def takes_block(item: Item, state: State, chosen: Strategies, lr: float | Tensor) -> bool:
    """Whether an active block can be stepped so: one that is not torch's AdamW to the bit."""
    kept, dtype = state["exp_avg"].dtype if "exp_avg" in state else None, item.param.dtype
    same = kept == compute_dtype(dtype) != dtype
    return same and _plain(chosen, item.param, lr) and _stored(item)


def _plain(chosen: Strategies, param: Tensor, lr: float | Tensor) -> bool:
    """Whether factors are numbers on the host, and moments are updated where they are."""
    plain = type(chosen.rule) is AdamW and type(chosen.residual) in (Drop, Free)
    rounds = chosen.rounding and param.dtype == torch.bfloat16
    if not plain or rounds or chosen.maximize or chosen.aged or isinstance(lr, Tensor):
        return False
    return type(chosen.store) is FloatStore and not branchless(param)


def _stored(item: Item) -> bool:
    """Whether its matrix is a view of the parameter, and its gradient a whole one."""
    assert item.view is not None
    whole = not isinstance(item.param.grad, ProjectedGrad)
    return whole and item.view.of(item.param).data_ptr() == item.param.data_ptr()


def step_(
    items: Sequence[Item],
    states: Sequence[State],
    chosen: Strategies,
    lr: float,
    weight_decay: float,
) -> None:
    """A step of each, its rows drawn again if it is time."""
    rule = chosen.rule
    assert isinstance(rule, AdamW)
    for item, state in zip(items, states, strict=True):
        view, subspace = item.view, item.subspace
        assert view is not None and subspace is not None and item.param.grad is not None
        grad, step = view.of(item.param.grad), int(state["step"])
        if basis_due(item, state, chosen):
            refresh_(item, state, grad, step, chosen)
        state["step"] += 1
        (norm,) = ops.total_norms([grad])
        if not math.isfinite(norm):
            logger.warning("the gradient of %s is not finite: its step is skipped", item.name)
            continue
        last = max(int(state["refresh_step"]), 0)
        time = step + 1 - (last if chosen.on_refresh == "reset" else 0)
        eps, correction = rule.factors(float(time))
        seen = Seen(grad, grad, grad, correction, subspace, None)
        term = chosen.residual.after(state, seen)
        size = lr * chosen.lr_scale * correction
        free, gain = "none", 0.0
        if term is not None:
            assert isinstance(term.gain, float | int)
            free, gain = FREE[term.kind], term.gain
        first, second = (state[slot_key("low", name)] for name in ("exp_avg", "exp_avg_sq"))
        # one call each, while its gradient is in the cache
        ops.coordinate_adamw_(
            [view.of(item.param)], [grad], [state["index"]], [first], [second], *rule.betas,
            [eps], [size * subspace.scale], [size * gain], 1 - lr * weight_decay, free,
        )  # fmt: skip


def step_block_(
    item: Item, state: State, chosen: Strategies, lr: float, weight_decay: float, since: int
) -> None:
    """A step of an active block: the same with all rows picked.

    Args:
        item: the block.
        state: its state.
        chosen: what its group chose.
        lr: learning rate.
        weight_decay: decoupled decay.
        since: steps it had taken before its moments began.
    """
    rule, view = chosen.rule, item.view
    assert isinstance(rule, AdamW) and view is not None and item.param.grad is not None
    grad = view.of(item.param.grad)
    (norm,) = ops.total_norms([grad])
    state["step"] += 1
    if not math.isfinite(norm):
        logger.warning("the gradient of %s is not finite: its step is skipped", item.name)
        return
    eps, correction = rule.factors(float(state["step"]) - since)
    rows = torch.arange(view.m, dtype=torch.int32)
    shape = (*view.batch, view.m, view.n)
    first, second = (state[name].view(shape) for name in ("exp_avg", "exp_avg_sq"))
    ops.coordinate_adamw_(
        [view.of(item.param)], [grad], [rows], [first], [second], *rule.betas,
        [eps], [lr * chosen.lr_scale * correction], [0.0], 1 - lr * weight_decay, "none",
    )  # fmt: skip
