"""The four phases of a step: refresh?, project, adapt, apply. The only place that knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from operator import not_

from torch import Tensor

from lowrank_optim.engine.adapt import adapt
from lowrank_optim.engine.apply import prepared, push
from lowrank_optim.engine.blocks import IdleBlock
from lowrank_optim.engine.bucket import Bucket, BucketStep, bucketed, warn_skipped
from lowrank_optim.engine.dense import Dense
from lowrank_optim.engine.draws import weight_noises
from lowrank_optim.engine.fused import FUSED
from lowrank_optim.engine.matrix_step import MatrixStep, count_, portions
from lowrank_optim.engine.offload import Staging, load_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.project import measure, project
from lowrank_optim.engine.reserve import written
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.rules.base import finished
from lowrank_optim.tensors.projected_grad import ProjectedGrad


class Phases:
    """refresh?, project, adapt, apply: what every matrix can be stepped by."""

    def can_step(self, bucket: Bucket) -> bool:
        """Any bucket of matrices."""
        return True

    def step_(self, bucket: Bucket) -> None:
        """The phases, each over the whole bucket where an accelerator takes it so."""
        items, states, chosen, lr, weight_decay, undo = bucket
        pairs = list(zip(items, states, strict=True))
        work = [w for part in portions(pairs) for w in project(part, chosen, undo)]
        count_([w.state["step"] for w in work])
        measure([w for w in work if w.finite is None])  # a search for a basis may have said
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
        bucket.undo.begin(state, item)
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
    """One step of parameters of a group: alike matrices together, as many as a cache takes.

    On an accelerator those that look for a basis come last. Their host launches much and waits for
    a factorisation: until then its device has the steps of all others to do.
    """
    states = {id(item): state_of(item) for item in items}
    late = [_searches(item, states[id(item)], chosen) for item in items]
    parts = [items]
    if any(late):
        parts = [[*compress(items, map(not_, late))], [*compress(items, late)]]
    buckets = [
        Bucket(own, [states[id(item)] for item in own], chosen, lr, weight_decay, undo)
        for part in parts
        for own in bucketed(part, chosen)
    ]
    step_buckets(buckets, staging)


def _searches(item: ParamPlan, state: State, chosen: Strategies) -> bool:
    """Whether a matrix on an accelerator looks for a basis in this step, and others may not."""
    subspace = item.subspace
    if chosen.gap == 1 or subspace is None or not (subspace.fitted or subspace.of_weight):
        return False
    if not on_accelerator(item.param) or isinstance(item.param.grad, ProjectedGrad):
        return False
    return basis_due(item, state, chosen, quiet=True)


def _is_finite(w: MatrixStep) -> bool:
    finite = math.isfinite(w.norm)
    if not finite:
        warn_skipped(w.item)
    return finite
