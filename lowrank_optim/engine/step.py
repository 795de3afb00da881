"""The four phases of a step: refresh?, project, adapt, apply. The only place that knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.apply import prepared, push
from lowrank_optim.engine.blocks import IdleBlock
from lowrank_optim.engine.bucket import Bucket, BucketStep, warn_skipped
from lowrank_optim.engine.dense import Dense
from lowrank_optim.engine.fused import FUSED
from lowrank_optim.engine.matrix_step import (
    MatrixStep,
    begun,
    finite_of,
    mark,
    portions,
    turn_,
)
from lowrank_optim.engine.momentum import join_lost_, momentum_of
from lowrank_optim.engine.offload import Staging, load_of
from lowrank_optim.engine.plan import (
    ParamPlan,
    State,
    Strategies,
    age_key,
    read_slots,
    refreshed_keys,
    slot_keys,
    weight_noises,
    write_slots_,
)
from lowrank_optim.engine.refresh import basis_due, refreshing_
from lowrank_optim.engine.reserve import written
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.residuals import Drop
from lowrank_optim.rules.base import Asking, Slot, Split, compute_dtype, finished
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.base import BasisChange
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.searches import Searching, together
from lowrank_optim.tensors.projected_grad import ProjectedGrad

_Plan = TypeVar("_Plan", bound=ParamPlan)

CHUNK_BYTES = {False: 1 << 22, True: 1 << 28}
"""Low-rank gradients alive at once: within a CPU's cache, or enough to fill an accelerator."""
SEARCH_BYTES = 1 << 26
"""Those of matrices of an accelerator whose bases are fitted at once: a search holds several
tensors as large as a basis of each."""


class Phases:
    """refresh?, project, adapt, apply: what every matrix can be stepped by."""

    def can_step(self, bucket: Bucket) -> bool:
        """Any bucket of matrices."""
        return True

    def step_(self, bucket: Bucket) -> None:
        """The phases, each over the whole bucket where an accelerator takes it so."""
        items, states, chosen, lr, weight_decay, undo = bucket
        pairs = list(zip(items, states, strict=True))
        work = [w for part in portions(pairs) for w in _project(part, chosen, undo)]
        count_([w.state["step"] for w in work])
        _measure([w for w in work if w.finite is None])  # a search for a basis may have said
        if not on_accelerator(work[0].grad):
            work = [w for w in work if _is_finite(w)]

        def write(work: Sequence[MatrixStep], undo: Undo) -> None:
            finished(adapt(work, chosen, undo))
            for alike in portions([(w.item, w) for w in work]):
                own = [w for _, w in alike]
                rounding = weight_noises([w.item for w in own], [w.state for w in own], chosen)
                push(own, prepared(own, chosen, lr, weight_decay, undo, rounding), chosen, undo)

        written(work, chosen, undo, write)


WAYS: tuple[BucketStep, ...] = (IdleBlock(), Dense(), Phases())
"""What steps a bucket that no fused step takes; the first that can."""


def step_bucket(bucket: Bucket) -> None:
    """One step of a bucket, all of it on its device; ``undo`` puts back what it knows of."""
    way = next(way for way in (*FUSED, *WAYS) if way.can_step(bucket))
    for item, state in zip(bucket.items, bucket.states, strict=True):
        bucket.undo.begin(state, item.index)
    way.step_(bucket)
    for state in bucket.states:
        bucket.undo.done(state)


def step_buckets(buckets: Sequence[Bucket], staging: Staging) -> None:
    """One step of buckets in turn: what the next needs of host memory comes while one is stepped.

    Args:
        buckets: of one group.
        staging: what they pass through where their state rests on the host.
    """
    if not buckets:
        return
    chosen, undo = buckets[0].chosen, buckets[0].undo
    if not chosen.offload:
        for bucket in buckets:
            step_bucket(bucket)
        return
    there = replace(chosen, offload=False)
    loads = [load_of(bucket.items, bucket.states, chosen) for bucket in buckets]
    staging.each(loads, lambda n: step_bucket(buckets[n]._replace(chosen=there)), undo)


def step_items(
    items: Sequence[ParamPlan],
    state_of: Callable[[ParamPlan], State],
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    undo: Undo,
    staging: Staging,
) -> None:
    """One step of parameters of a group: alike matrices together, as many as a cache takes."""
    buckets = [
        Bucket(own, [state_of(item) for item in own], chosen, lr, weight_decay, undo)
        for own in bucketed(items, chosen)
    ]
    step_buckets(buckets, staging)


def bucketed(
    items: Sequence[_Plan],
    chosen: Strategies,
    key: Callable[[_Plan], Any] = attrgetter("key"),
) -> list[Sequence[_Plan]]:
    """Which parameters of a group are stepped together, in what order.

    Args:
        items: parameters of a group.
        chosen: what their group chose.
        key: equal of matrices that can be stepped together (default: that of their plan).
    """
    found: list[Sequence[_Plan]] = []
    alike: dict[Any, list[_Plan]] = {}
    for item in items:
        if item.subspace is not None and not isinstance(item.subspace, Block):
            alike.setdefault(key(item), []).append(item)
        else:
            found.append([item])
    for own in alike.values():
        size = chunk_size(own[0], chosen)
        found += [own[i : i + size] for i in range(0, len(own), size)]
    return found


def chunk_size(item: ParamPlan, chosen: Strategies, most: int | None = None) -> int:
    """How many alike matrices to step at once, or so many that they have ``most`` bytes."""
    assert item.subspace is not None and item.view is not None
    shapes = item.subspace.coord_shapes(item.view).values()
    size = 4 * sum(math.prod(shape) for shape in shapes)
    if chosen.residual.wants == "memory":
        size += 4 * item.param.numel()
    most = CHUNK_BYTES[on_accelerator(item.param)] if most is None else most
    return max(1, most // max(1, size))


def count_(steps: list[Tensor]) -> None:
    """One step more of each, on the host or on a device."""
    if on_accelerator(steps[0]):
        torch._foreach_add_(steps, 1)
    else:  # as torch: a number would be made a tensor for each
        torch._foreach_add_(steps, [torch.ones(())] * len(steps))


def _measure(work: Sequence[MatrixStep]) -> None:
    """Norms of all coordinates, one call for each; of gradients that they do not see whole."""
    if not work:
        return
    if work[0].item.subspace is not None and not work[0].item.subspace.sees_all:
        norms = [ops.total_norms([w.grad for w in work])]
    else:
        norms = [ops.total_norms([w.coords[name] for w in work]) for name in work[0].coords]
    for w, *own in zip(work, *norms, strict=True):
        w.norm = own[0]
    if len(norms) > 1:
        totals = torch.stack([torch.stack(list(own)) for own in norms]).sum(0)
        for w, total in zip(work, totals.unbind(0), strict=True):
            w.norm = total
    first = [w for w in work if not w.based]
    if first:
        for w, norm in zip(first, ops.total_norms([w.grad for w in first]), strict=True):
            w.norm = w.norm + norm  # finite if both are
    if on_accelerator(work[0].grad):
        mark(work)


def _is_finite(w: MatrixStep) -> bool:
    finite = math.isfinite(w.norm)
    if not finite:
        warn_skipped(w.item)
    return finite


def _project(
    pairs: Sequence[tuple[ParamPlan, State]], chosen: Strategies, undo: Undo
) -> list[MatrixStep]:
    """Phases one and two: refresh the bases that are due, then take coordinates."""
    due = [
        not isinstance(item.param.grad, ProjectedGrad) and basis_due(item, state, chosen)
        for item, state in pairs
    ]
    based = [
        not (own or item.tried >= 0) or _has_basis(item, state)
        for (item, state), own in zip(pairs, due, strict=True)
    ]
    _keep(list(compress(pairs, due)), chosen, undo)
    work = zip(pairs, _gradients(pairs, chosen), due, strict=True)
    searches = [_refreshed(*pair, grad, own, chosen) for pair, grad, own in work]
    size = _searched_at_once(pairs, due, chosen)
    parts = (searches[i : i + size] for i in range(0, len(searches), size))
    found = [x for part in parts for x in together(part)]
    at = [n for n, (_, coords, _) in enumerate(found) if not coords]
    if at:
        (item, _), *_ = pairs
        assert item.subspace is not None
        lows = item.subspace.coords_of([pairs[n][1] for n in at], [found[n][0] for n in at])
        for n, low in zip(at, lows, strict=True):
            found[n][1].update(low)
    works = [
        begun(item, state, grad, coords, chosen, finite)
        for (item, state), (grad, coords, finite) in zip(pairs, found, strict=True)
    ]
    for w, known in zip(works, based, strict=True):
        w.based = known
    turn_(works, chosen)
    return works


def _searched_at_once(
    pairs: Sequence[tuple[ParamPlan, State]], due: Sequence[bool], chosen: Strategies
) -> int:
    """How many of alike matrices look for bases beside each other."""
    (item, _), *_ = pairs
    assert item.subspace is not None
    if any(due) and (item.subspace.fitted or item.subspace.of_weight):
        return chunk_size(item, chosen, SEARCH_BYTES)
    return len(pairs)


def _has_basis(item: ParamPlan, state: State) -> bool:
    """Whether coordinates are those of some basis, and not zeros."""
    assert item.subspace is not None
    drawn = isinstance(item.param.grad, ProjectedGrad) or not item.subspace.needs_grad
    return drawn or int(state["refresh_step"]) >= 0


def _keep(pairs: Sequence[tuple[ParamPlan, State]], chosen: Strategies, undo: Undo) -> None:
    """What refreshes may overwrite, of all at once."""
    keys: dict[str, None] = {}
    for item, state in pairs:
        assert item.subspace is not None
        if item.subspace.moves_weights:
            undo.keep_weights(state, item.param)
        keys.update(dict.fromkeys(refreshed_keys(item.subspace, state, chosen)))
    undo.keep_all([state for _, state in pairs], keys)


def _gradients(
    pairs: Sequence[tuple[ParamPlan, State]], chosen: Strategies
) -> list[Tensor | ProjectedGrad]:
    """Of each, with what is added to it; what was projected inside backward as it is."""
    grads: list[Tensor | ProjectedGrad] = []
    for item, _ in pairs:
        assert item.view is not None and item.param.grad is not None
        own = item.param.grad
        grads.append(own if isinstance(own, ProjectedGrad) else item.view.of(own))
    at = [n for n, grad in enumerate(grads) if not isinstance(grad, ProjectedGrad)]
    if at:
        states, whole = [pairs[n][1] for n in at], [grads[n] for n in at]
        for n, grad in zip(at, chosen.residual.before_all(states, whole), strict=True):
            grads[n] = grad
    return grads


def _refreshed(
    item: ParamPlan, state: State, grad: Tensor | ProjectedGrad, due: bool, chosen: Strategies
) -> Searching[tuple[Tensor, dict[str, Tensor], Tensor | None]]:
    """The gradient, and the coordinates that are known already.

    With them whether it is finite, if a search has said so on its device.
    """
    coords: dict[str, Tensor] = {}
    moved: dict[str, BasisChange] = {}
    if isinstance(grad, ProjectedGrad):  # taken inside backward, in a basis that is not due
        state.update(grad.fresh)
        if int(state["refresh_step"]) < 0:
            state["postponed"] += 1  # no gradient yet that says something
        coords = {k: x.clone() if chosen.maximize else x for k, x in grad.coords.items()}
    else:
        held, item.before = item.before, None
        if due:
            if chosen.residual.lost:
                held = momentum_of(item, state, chosen, copied=True)
            step = int(state["step"])
            yield from refreshing_(item, state, grad, step, chosen, moved, later=True)
        join_lost_(held, state, grad, chosen)
    coords |= {k: own.low for k, own in moved.items() if own.low is not None}
    said = (own.finite for own in moved.values() if own.finite is not None)
    return grad, coords, next(said, None)


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
    plain = plain and not chosen.capturable  # factors on the device multiply it first
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
