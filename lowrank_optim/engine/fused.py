"""AdamW on rows, cosines or whole tensors in one pass over W and G, on a host that can look at G.

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
from lowrank_optim.engine.plan import (
    ParamPlan,
    State,
    Strategies,
    age_key,
    on_accelerator,
    slot_key,
)
from lowrank_optim.engine.refresh import basis_due, refresh_
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Rows
from lowrank_optim.residuals import Drop, Free, ResidualInputs
from lowrank_optim.rules.adamw import AdamW
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.stores import FloatStore
from lowrank_optim.subspaces.coordinate import FREE, Coordinates
from lowrank_optim.subspaces.dct import DCT
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.projected_grad import ProjectedGrad

logger = logging.getLogger(__name__)


def takes(
    items: Sequence[ParamPlan], states: Sequence[State], chosen: Strategies, lr: float | Tensor
) -> bool:
    """Whether a bucket of rows, or of cosines that kernels transform, can be stepped so."""
    subspace, view, param = items[0].subspace, items[0].view, items[0].param
    assert view is not None
    if isinstance(subspace, DCT):
        alone = not subspace.two_sided and not view.batch and type(chosen.residual) is Drop
        fits = alone and subspace.fused(view.m, param)
    else:
        fits = isinstance(subspace, Coordinates) and not chosen.aged
    if not fits or not _plain(chosen, param, lr):
        return False
    kept = states[0][slot_key("low", "exp_avg")].dtype
    return kept == compute_dtype(param.dtype) and all(_stored(item) for item in items)


def can_step_block(item: ParamPlan, state: State, chosen: Strategies, lr: float | Tensor) -> bool:
    """Whether an active block can be stepped so: one that is not torch's AdamW to the bit."""
    kept, dtype = state["exp_avg"].dtype if "exp_avg" in state else None, item.param.dtype
    same = kept == compute_dtype(dtype) != dtype and not chosen.aged
    return same and _plain(chosen, item.param, lr) and _stored(item)


def _plain(chosen: Strategies, param: Tensor, lr: float | Tensor) -> bool:
    """Whether factors are numbers on the host, and moments are updated where they are."""
    plain = type(chosen.rule) is AdamW and type(chosen.residual) in (Drop, Free)
    rounds = chosen.rounding and param.dtype == torch.bfloat16
    if not plain or rounds or chosen.maximize or isinstance(lr, Tensor):
        return False
    return type(chosen.store) is FloatStore and not on_accelerator(param)


def _stored(item: ParamPlan) -> bool:
    """Whether its matrix is a view of the parameter, and its gradient a whole one."""
    assert item.view is not None
    whole = not isinstance(item.param.grad, ProjectedGrad)
    return whole and shares_memory(item.view.of(item.param), item.param)


def step_(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    chosen: Strategies,
    lr: float,
    weight_decay: float,
    undo: Undo,
) -> None:
    """A step of each, its rows drawn again if it is time."""
    rule = chosen.rule
    assert isinstance(rule, AdamW)
    if isinstance(items[0].subspace, DCT):
        _step_cosines_(items, states, chosen, lr, weight_decay, undo)
        return
    for item, state in zip(items, states, strict=True):
        view, subspace = item.view, item.subspace
        assert view is not None and subspace is not None and item.param.grad is not None
        undo.begin(state)
        grad, step = view.of(item.param.grad), int(state["step"])
        if basis_due(item, state, chosen):
            undo.keep(state, subspace.refreshed(state))
            refresh_(item, state, grad, step, chosen)
        state["step"] += 1
        if not _is_finite(item, grad):
            continue
        eps, correction = rule.factors(_time(state, chosen))
        seen = ResidualInputs(grad, grad, grad, correction, subspace, None)
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
        undo.done(state)


def _step_cosines_(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    chosen: Strategies,
    lr: float,
    weight_decay: float,
    undo: Undo,
) -> None:
    """Cosines are chosen again where it is time; the step itself reads moments where they stood."""
    rule, subspace, view = chosen.rule, items[0].subspace, items[0].view
    assert isinstance(rule, AdamW) and isinstance(subspace, DCT) and view is not None
    grads = [view.of(item.param.grad) for item in items if item.param.grad is not None]
    for state in states:
        undo.begin(state)
        undo.keep(state, ("basis_index", age_key("low")))  # moments move in the step itself
    sources, looked = _chosen_again(items, states, grads, chosen, undo)
    torch._foreach_add_([state["step"] for state in states], [torch.ones(())] * len(items))
    at = [n for n, ok in enumerate(looked) if ok or _is_finite(items[n], grads[n])]
    if not at:
        return
    factors = [rule.factors(_time(states[n], chosen)) for n in at]
    rows, corrections = Rows(), [correction for _, correction in factors]
    if chosen.aged:
        rows = rule.rows([states[n][age_key("low")].add_(1) for n in at], torch.float32)
        corrections = [1.0] * len(at)
    first, second = ([states[n][slot_key("low", x)] for n in at] for x in ("exp_avg", "exp_avg_sq"))
    size = lr * chosen.lr_scale * subspace.scale
    ops.cosine_adamw_(
        [view.of(items[n].param) for n in at], [grads[n] for n in at],
        [states[n]["basis_index"] for n in at], [sources[n] for n in at] if sources else [],
        first, second, *rule.betas, [eps for eps, _ in factors], rows,
        [size * correction for correction in corrections], subspace.plan(view.m, grads[0]),
        subspace.basis, 1 - lr * weight_decay,
    )  # fmt: skip


def _chosen_again(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    grads: Sequence[Tensor],
    chosen: Strategies,
    undo: Undo,
) -> tuple[list[Tensor], list[bool]]:
    """Where the moments of each row stand, if any moved; and whose gradient was looked at."""
    subspace = items[0].subspace
    assert isinstance(subspace, DCT)
    due = [n for n, item in enumerate(items) if basis_due(item, states[n], chosen)]
    looks = dict(zip(due, subspace.look_at([grads[n] for n in due]), strict=True))
    found: dict[int, Tensor] = {}
    looked = [False] * len(items)
    for n, look in looks.items():
        own: dict[str, Tensor] = {}
        if chosen.on_refresh == "reset":
            undo.keep(states[n], subspace.refreshed(states[n]))
        step = int(states[n]["step"])
        looked[n] = refresh_(items[n], states[n], grads[n], step, chosen, sources=own, look=look)
        if own:
            (found[n],) = own.values()
    if not found:
        return [], looked
    stay = torch.arange(subspace.rank, dtype=torch.int32)
    return [found.get(n, stay) for n in range(len(items))], looked


def _is_finite(item: ParamPlan, grad: Tensor) -> bool:
    finite = math.isfinite(ops.total_norms([grad])[0])
    if not finite:
        logger.warning("the gradient of %s is not finite: its step is skipped", item.name)
    return finite


def _time(state: State, chosen: Strategies) -> float:
    """Steps that the moments have seen, the one being taken included and counted already."""
    last = max(int(state["refresh_step"]), 0)
    return float(state["step"]) - (last if chosen.on_refresh == "reset" else 0)


def step_block_(
    item: ParamPlan, state: State, chosen: Strategies, lr: float, weight_decay: float, since: int
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
    state["step"] += 1
    if not _is_finite(item, grad):
        return
    eps, correction = rule.factors(float(state["step"]) - since)
    rows = torch.arange(view.m, dtype=torch.int32)
    shape = (*view.batch, view.m, view.n)
    first, second = (state[name].view(shape) for name in ("exp_avg", "exp_avg_sq"))
    ops.coordinate_adamw_(
        [view.of(item.param)], [grad], [rows], [first], [second], *rule.betas,
        [eps], [lr * chosen.lr_scale * correction], [0.0], 1 - lr * weight_decay, "none",
    )  # fmt: skip
