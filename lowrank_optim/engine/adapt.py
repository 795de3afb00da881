"""Phase three of a step: directions of coordinates by the rule, whose moments are updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.matrix_step import MatrixStep, finite_of
from lowrank_optim.engine.moments import read_slots, slot_keys, write_slots_
from lowrank_optim.engine.plan import Strategies
from lowrank_optim.engine.state import age_key
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.residuals import Drop
from lowrank_optim.rules.base import Asking, Slot, Split, compute_dtype
from lowrank_optim.stores import scale_key


def adapt(
    work: Sequence[MatrixStep],
    chosen: Strategies,
    undo: Undo,
    splits: Mapping[str, Split] | None = None,
) -> Asking[None]:
    """Phase three: directions of every coordinate of alike matrices, moments updated.

    Args:
        work: the matrices.
        chosen: what their group chose.
        undo: what to put back.
        splits: how coordinates lie on the ranks, where a part of them is here (default: of none).
    """
    for coord in work[0].coords if work else ():
        split = None if splits is None else splits.get(coord)
        results = yield from _adapt(work, coord, chosen, undo, split)
        for w, result in zip(work, results, strict=True):
            w.directions[coord] = result


def _adapt(
    work: Sequence[MatrixStep], coord: str, chosen: Strategies, undo: Undo, split: Split | None
) -> Asking[list[tuple[Tensor, float | Tensor]]]:
    """Directions of one coordinate: moments are read, updated and written back."""
    grads = [w.coords[coord] for w in work]
    keys = slot_keys(coord, grads[0].shape, chosen)
    # on an accelerator a copy is one more pass, and between adapt and apply only memory can fail
    items, states = [w.item for w in work], [w.state for w in work]
    overwritten = [key for key, _ in keys]
    overwritten += [scale_key(key) for key in overwritten] + [age_key(coord)]
    if not on_accelerator(grads[0]):
        undo.keep_all(states, overwritten)
    else:
        params, names = [item.param for item in items], [item.name for item in items]
        undo.loosen(states, params, names, overwritten)
    held = read_slots(items, states, coord, grads[0].shape, chosen)
    finite = finite_of(work)
    times = _times_on_device(work, chosen) if chosen.capturable else [w.time for w in work]
    # in the weights' dtype if it goes into their GEMM as it is, else in that of arithmetic
    plain = coord == "low" and isinstance(chosen.residual, Drop) and not chosen.rounding
    if chosen.capturable:  # a step size there multiplies it first, unless the product reads that
        plain = plain and ops.reads_factors(work[0].item.param)
    dtype = work[0].item.param.dtype
    if not plain or ops.product_dtype(dtype) != dtype:  # or it may be beyond that format
        dtype = compute_dtype(dtype)
    moments = [
        [_columns(x, slot, g) for _, slot, x in own] for own, g in zip(held, grads, strict=True)
    ]
    ages = _older_(work, coord) if chosen.aged else []
    directions, corrections = yield from chosen.rule.phases_(
        grads, moments, times, dtype, finite, ages, split
    )
    write_slots_(items, states, held, chosen, finite)
    return list(zip(directions, corrections, strict=True))


def _times_on_device(work: Sequence[MatrixStep], chosen: Strategies) -> Tensor:
    """Steps ``(k,)`` that the moments of each have seen, this one included: counted already."""
    steps = torch.stack([w.state["step"] for w in work])
    if chosen.on_refresh != "reset":
        return steps
    return steps - torch.stack([w.state["refresh_step"] for w in work]).clamp(min=0)


def _columns(x: Moment, slot: Slot, grad: Tensor) -> Moment:
    """What a moment has of the columns of ``grad``: others behind them fill up a block."""
    if isinstance(x, Quantized) or slot.averaged == -1 or x.shape[-1] == grad.shape[-1]:
        return x
    return x[..., : grad.shape[-1]]


def _older_(work: Sequence[MatrixStep], coord: str) -> list[Tensor]:
    """The age of each row, this step included."""
    ages = [w.state[age_key(coord)] for w in work]
    ops.count_(ages, finite_of(work))
    return ages
