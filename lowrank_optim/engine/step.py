"""The four phases of a step: refresh?, project, adapt, apply. The only place that knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.blocks import IdleBlock
from lowrank_optim.engine.bucket import Bucket, BucketStep, warn_skipped
from lowrank_optim.engine.dense import Dense
from lowrank_optim.engine.fused import FUSED
from lowrank_optim.engine.plan import (
    ParamPlan,
    State,
    Strategies,
    age_key,
    read_slots,
    slot_keys,
    weight_noise,
    write_slots_,
)
from lowrank_optim.engine.refresh import basis_due, refreshing_
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.residuals import Drop, Measured, ResidualInputs
from lowrank_optim.rules.base import Asking, Slot, Split, compute_dtype, finished
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.base import Target, identity
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.eigenvectors import Searching, together
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.projected_grad import ProjectedGrad

CHUNK_BYTES = {False: 1 << 22, True: 1 << 26}
"""Low-rank gradients alive at once: within a CPU's cache, or enough to fill an accelerator."""


@dataclass(eq=False, slots=True)
class MatrixStep:
    """One matrix on its way through a step."""

    item: ParamPlan
    state: State
    grad: Tensor
    coords: dict[str, Tensor]
    time: float
    """Steps that the moments have seen, this one included; NaN where the device counts them."""
    norm: Tensor = field(init=False)
    """Of its coordinates, on its device: not finite where the gradient is not."""
    directions: dict[str, tuple[Tensor, float | Tensor]] = field(default_factory=dict)
    """Of each coordinate, with the factor that corrects its bias."""
    whole: tuple[int, int] | None = None
    """Sides of the whole matrix, where only columns are here."""
    rms: Tensor | None = None
    """Root mean square of all weights, where step sizes depend on it and a part of them is here."""
    measured: Measured | None = None
    """What its residual needs of the whole matrix, where others have columns of it."""

    @property
    def finite(self) -> Tensor:
        """Whether the gradient is finite, on its device."""
        return self.norm.isfinite()


class Phases:
    """refresh?, project, adapt, apply: what every matrix can be stepped by."""

    def can_step(self, bucket: Bucket) -> bool:
        """Any bucket of matrices."""
        return True

    def step_(self, bucket: Bucket) -> None:
        """The phases, each over the whole bucket but the last."""
        items, states, chosen, lr, weight_decay, undo = bucket
        each = zip(items, states, strict=True)
        work = together([_project(item, state, chosen, undo) for item, state in each])
        count_([w.state["step"] for w in work])
        _measure(work)
        if not on_accelerator(work[0].grad):
            work = [w for w in work if _is_finite(w)]
        finished(adapt(work, chosen, undo))
        for w in work:
            rounding = weight_noise(w.item, w.state, chosen)
            apply(w, chosen, lr, weight_decay, undo, rounding)


WAYS: tuple[BucketStep, ...] = (IdleBlock(), Dense(), Phases())
"""What steps a bucket that no fused step takes; the first that can."""


def step_bucket(bucket: Bucket) -> None:
    """One step of a bucket; its ``undo`` knows what to put back if that raises."""
    way = next(way for way in (*FUSED, *WAYS) if way.can_step(bucket))
    for state in bucket.states:
        bucket.undo.begin(state)
    way.step_(bucket)
    for state in bucket.states:
        bucket.undo.done(state)


def step_items(
    items: Sequence[ParamPlan],
    state_of: Callable[[ParamPlan], State],
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    undo: Undo,
) -> None:
    """One step of parameters of a group: alike matrices together, as many as a cache takes."""
    buckets: dict[Any, list[ParamPlan]] = {}
    for item in items:
        if item.subspace is not None and not isinstance(item.subspace, Block):
            buckets.setdefault(item.key, []).append(item)
            continue
        step_bucket(Bucket([item], [state_of(item)], chosen, lr, weight_decay, undo))
    for alike in buckets.values():
        size = chunk_size(alike[0], chosen)
        for i in range(0, len(alike), size):
            chunk = alike[i : i + size]
            states = [state_of(item) for item in chunk]
            step_bucket(Bucket(chunk, states, chosen, lr, weight_decay, undo))


def chunk_size(item: ParamPlan, chosen: Strategies) -> int:
    """How many alike matrices to step at once."""
    assert item.subspace is not None and item.view is not None
    shapes = item.subspace.coord_shapes(item.view).values()
    size = 4 * sum(math.prod(shape) for shape in shapes)
    if chosen.residual.wants == "memory":
        size += 4 * item.param.numel()
    return max(1, CHUNK_BYTES[on_accelerator(item.param)] // max(1, size))


def count_(steps: list[Tensor]) -> None:
    """One step more of each, on the host or on a device."""
    if on_accelerator(steps[0]):
        torch._foreach_add_(steps, 1)
    else:  # as torch: a number would be made a tensor for each
        torch._foreach_add_(steps, [torch.ones(())] * len(steps))


def _measure(work: Sequence[MatrixStep]) -> None:
    """Norms of all coordinates, one call for each; of gradients that they do not see whole."""
    if work[0].item.subspace is not None and not work[0].item.subspace.sees_all:
        norms = [ops.total_norms([w.grad for w in work])]
    else:
        norms = [ops.total_norms([w.coords[name] for w in work]) for name in work[0].coords]
    for w, *own in zip(work, *norms, strict=True):
        w.norm = own[0] if len(own) == 1 else torch.stack(own).sum()


def _is_finite(w: MatrixStep) -> bool:
    finite = math.isfinite(w.norm)
    if not finite:
        warn_skipped(w.item)
    return finite


def _project(
    item: ParamPlan, state: State, chosen: Strategies, undo: Undo
) -> Searching[MatrixStep]:
    """Phases one and two: refresh the basis if it is due, then take coordinates."""
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None and item.param.grad is not None
    grad = item.param.grad
    coords: dict[str, Tensor] = {}
    if isinstance(grad, ProjectedGrad):  # taken inside backward, in a basis that is not due
        state.update(grad.fresh)
        if int(state["refresh_step"]) < 0:
            state["postponed"] += 1  # no gradient yet that says something
        coords = {k: x.clone() if chosen.maximize else x for k, x in grad.coords.items()}
    else:
        grad = chosen.residual.before(state, view.of(grad))
        if basis_due(item, state, chosen):
            undo.keep(state, subspace.refreshed(state))
            step = int(state["step"])
            yield from refreshing_(item, state, grad, step, chosen, coords, later=True)
        coords = coords or subspace.coords(state, grad, reduce=identity)
    return begun(item, state, grad, coords, chosen)


def begun(
    item: ParamPlan, state: State, grad: Tensor, coords: dict[str, Tensor], chosen: Strategies
) -> MatrixStep:
    """A matrix whose coordinates are known, before its step is counted."""
    time = math.nan
    if not chosen.capturable:
        last = max(int(state["refresh_step"]), 0)
        time = float(int(state["step"]) + 1 - (last if chosen.on_refresh == "reset" else 0))
    if chosen.maximize:
        coords = {name: x.neg_() for name, x in coords.items()}
    return MatrixStep(item, state, grad, coords, time)


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
    if not on_accelerator(grads[0]):
        overwritten = [key for key, _ in keys]
        overwritten += [scale_key(key) for key in overwritten] + [age_key(coord)]
        for w in work:
            undo.keep(w.state, overwritten)
    held = [read_slots(w.item, w.state, keys, chosen) for w in work]
    # no host may wait for `finite`: the ops select on the device
    finite = [w.finite for w in work] if on_accelerator(grads[0]) else []
    times = _times_on_device(work, chosen) if chosen.capturable else [w.time for w in work]
    # in the weights' dtype if it goes into their GEMM as it is, else in that of arithmetic
    plain = coord == "low" and isinstance(chosen.residual, Drop) and not chosen.rounding
    plain = plain and not chosen.capturable  # factors on the device multiply it first
    dtype = work[0].item.param.dtype if plain else compute_dtype(work[0].item.param.dtype)
    moments = [
        [_columns(x, slot, g) for _, slot, x in own] for own, g in zip(held, grads, strict=True)
    ]
    ages = [_older_(w, coord) for w in work] if chosen.aged else []
    directions, corrections = yield from chosen.rule.phases_(
        grads, moments, times, dtype, finite, ages, split
    )
    for n, (w, own) in enumerate(zip(work, held, strict=True)):
        write_slots_(w.item, w.state, own, chosen, finite[n] if finite else None)
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


def _older_(w: MatrixStep, coord: str) -> Tensor:
    """The age of each row, this step included."""
    age = w.state[age_key(coord)]
    return age.add_(w.finite if on_accelerator(age) else 1)


def inputs_of(w: MatrixStep) -> ResidualInputs | None:
    """What its residual looks at; None where coordinates are not those of a basis."""
    low, subspace = w.coords.get("low"), w.item.subspace
    if low is None or subspace is None:
        return None
    finite = w.finite if on_accelerator(w.grad) else None
    return ResidualInputs(w.grad, low, *w.directions["low"], subspace, finite, w.whole)


def apply(
    w: MatrixStep,
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    undo: Undo,
    rounding: Noise | None,
) -> None:
    """Phase four: lift the direction and add it to the weights.

    Args:
        w: the matrix; its plan may stand for a buffer that its update is to be made in.
        chosen: what its group chose.
        lr: of the group.
        weight_decay: likewise.
        undo: what to put back.
        rounding: seed and positions of the weights as they are stored; None rounds to nearest.
    """
    push(w, prepared(w, chosen, lr, weight_decay, undo, rounding), chosen, undo)


class Push(NamedTuple):
    """What a subspace adds to the weights, and how."""

    into: Target
    update: dict[str, Tensor]
    term: Term | None


def prepared(
    w: MatrixStep,
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    undo: Undo,
    rounding: Noise | None,
) -> Push:
    """All that phase four needs to know, before it writes."""
    view, subspace = w.item.view, w.item.subspace
    assert view is not None and subspace is not None
    param = view.of(w.item.param)
    low, directions = w.coords.get("low"), w.directions
    finite = w.finite if on_accelerator(param) else None
    undo.keep(w.state, chosen.residual.stepped)
    seen = inputs_of(w)
    term = None
    if seen is not None:
        others = () if w.measured is None else (w.measured,)
        term = chosen.residual.after(w.state, seen, *others)
    step = math.nan if chosen.capturable else float(w.state["step"])
    size = chosen.rule.step_size(lr, step, param, w.rms)
    if isinstance(size, Tensor) and size.numel() == 1 and not on_accelerator(param):
        size = float(size)
    if not chosen.capturable:
        ramp = subspace.lr_factor(int(step) - 1 - max(0, int(w.state["refresh_step"])))
        size = size if ramp == 1 else size * ramp  # never in place: it may be the group's
    decay = 1 - size * weight_decay
    size = size if chosen.lr_scale == 1 else size * chosen.lr_scale
    name, (direction, correction) = next(iter(directions.items()))
    factor = size * correction
    if len(directions) == 1 and isinstance(factor, float):
        update, lr_now = {name: direction}, factor
    else:
        update, lr_now = {k: x * (c * size) for k, (x, c) in directions.items()}, 1.0
        if term is not None and isinstance(factor, Tensor):  # then there is one direction
            term = term.times(factor)
    if chosen.maximize and low is not None and subspace.applies_grad(term):
        # coordinates are those of -G, and so is all that is linear in them: turn both back
        update, low, lr_now = {k: -x for k, x in update.items()}, -low, -lr_now
    rounding = None if rounding is None else view.noise(rounding)
    # where nothing of it is applied the weights stand in: its coordinates alone may exist, or it
    # may be wider than the weights, as with error feedback
    grad = w.grad if subspace.applies_grad(term) else param
    return Push(Target(param, grad, low, lr_now, decay, rounding, finite), update, term)


def push(w: MatrixStep, ready: Push, chosen: Strategies, undo: Undo) -> None:
    """Write the weights, and what follows them."""
    view, subspace = w.item.view, w.item.subspace
    assert view is not None and subspace is not None
    param, finite = ready.into.param, ready.into.finite
    subspace.push_(ready.into, w.state, ready.update, ready.term)
    if not shares_memory(param, w.item.param):
        stored = param.mT if view.flip else param  # strides that allow no matrix view
        w.item.param.copy_(stored.reshape(view.shape))
    chosen.residual.keep_(w.state, w.grad, finite)
    undo.done(w.state)
