"""The four phases of a step: refresh?, project, adapt, apply. The only place that knows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

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
from lowrank_optim.engine.refresh import basis_due, refresh_
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import Noise
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.residuals import Drop, Measured, ResidualInputs
from lowrank_optim.rules.base import Asking, Split, compute_dtype, finished
from lowrank_optim.stores import scale_key
from lowrank_optim.subspaces.base import Target
from lowrank_optim.subspaces.block import Block
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.projected_grad import ProjectedGrad
from lowrank_optim.tensors.stacked import stacked

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
    """Steps that the moments have seen, this one included."""
    norm: Tensor = field(init=False)
    """Of its coordinates, on its device: not finite where the gradient is not."""
    finite: Tensor | None = None
    """Whether it is, where no host may wait for the answer."""
    directions: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    """Of each coordinate, with the factor that corrects its bias."""
    whole: tuple[int, int] | None = None
    """Sides of the whole matrix, where only columns are here."""
    rms: Tensor | None = None
    """Root mean square of all weights, where step sizes depend on it and a part of them is here."""
    measured: Measured | None = None
    """What its residual needs of the whole matrix, where others have columns of it."""


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
        torch._foreach_add_([w.state["step"] for w in work], [torch.ones(())] * len(work))
        _measure(work)
        if on_accelerator(work[0].grad):
            mark(work)
        else:
            work = [w for w in work if _is_finite(w)]
        finished(adapt(work, chosen, undo))
        for alike in portions([(w.item, w) for w in work]):
            own = [w for _, w in alike]
            rounding = [weight_noise(w.item, w.state, chosen) for w in own]
            push(own, prepared(own, chosen, lr, weight_decay, undo, rounding), chosen, undo)


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


_T = TypeVar("_T")


def portions(work: Sequence[tuple[ParamPlan, _T]]) -> Iterator[Sequence[tuple[ParamPlan, _T]]]:
    """Matrices of a bucket that a phase takes at once.

    All of them on an accelerator, which is asked for as few kernels as there can be; one on a CPU,
    so that what is computed of a matrix is in the cache when its weights are written.
    """
    if not work:
        return
    size = len(work) if on_accelerator(work[0][0].param) else 1
    for start in range(0, len(work), size):
        yield work[start : start + size]


def mark(work: Sequence[MatrixStep]) -> None:
    """Whether gradients are finite, of all at once, where no host may wait for the answer."""
    # a norm is not negative: it is less than infinity, or not a number, or infinite
    flags = torch.stack([w.norm for w in work]) < math.inf
    for w, flag in zip(work, flags.unbind(0), strict=True):
        w.finite = flag


def _measure(work: Sequence[MatrixStep]) -> None:
    """Norms of all coordinates, one call for each; of gradients that they do not see whole."""
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


def _is_finite(w: MatrixStep) -> bool:
    finite = math.isfinite(w.norm)
    if not finite:
        warn_skipped(w.item)
    return finite


def _project(
    pairs: Sequence[tuple[ParamPlan, State]], chosen: Strategies, undo: Undo
) -> list[MatrixStep]:
    """Phases one and two: refresh the bases that are due, then take coordinates."""
    found = [_refreshed(item, state, chosen, undo) for item, state in pairs]
    at = [n for n, (_, coords) in enumerate(found) if not coords]
    if at:
        (item, _), *_ = pairs
        assert item.subspace is not None
        lows = item.subspace.coords_of([pairs[n][1] for n in at], [found[n][0] for n in at])
        for n, low in zip(at, lows, strict=True):
            found[n][1].update(low)
    works = [
        begun(item, state, grad, coords, chosen)
        for (item, state), (grad, coords) in zip(pairs, found, strict=True)
    ]
    turn_(works, chosen)
    return works


def _refreshed(
    item: ParamPlan, state: State, chosen: Strategies, undo: Undo
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient, with what is added to it, and the coordinates that are known already."""
    view, subspace = item.view, item.subspace
    assert view is not None and subspace is not None and item.param.grad is not None
    grad, step = item.param.grad, int(state["step"])
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
            refresh_(item, state, grad, step, chosen, coords)
    return grad, coords


def begun(
    item: ParamPlan, state: State, grad: Tensor, coords: dict[str, Tensor], chosen: Strategies
) -> MatrixStep:
    """A matrix whose coordinates are known, before its step is counted."""
    last = max(int(state["refresh_step"]), 0)
    time = int(state["step"]) + 1 - (last if chosen.on_refresh == "reset" else 0)
    return MatrixStep(item, state, grad, coords, float(time))


def turn_(works: Sequence[MatrixStep], chosen: Strategies) -> None:
    """Coordinates of gradients become those of what is minimised."""
    if chosen.maximize:
        torch._foreach_neg_([x for w in works for x in w.coords.values()])


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
) -> Asking[list[tuple[Tensor, float]]]:
    """Directions of one coordinate: moments are read, updated and written back."""
    grads = [w.coords[coord] for w in work]
    keys = slot_keys(coord, grads[0].shape, chosen)
    # on an accelerator a copy is one more pass, and between adapt and apply only memory can fail
    if not on_accelerator(grads[0]):
        overwritten = [key for key, _ in keys]
        overwritten += [scale_key(key) for key in overwritten] + [age_key(coord)]
        undo.keep_all([w.state for w in work], overwritten)
    held = [read_slots(w.item, w.state, keys, chosen) for w in work]
    finite = finite_of(work)
    times = [w.time for w in work]
    # in the weights' dtype if it goes into their GEMM as it is, else in that of arithmetic
    plain = coord == "low" and isinstance(chosen.residual, Drop) and not chosen.rounding
    dtype = work[0].item.param.dtype if plain else compute_dtype(work[0].item.param.dtype)
    moments = [[x for _, _, x in own] for own in held]
    ages = _older_(work, coord) if chosen.aged else []
    directions, corrections = yield from chosen.rule.phases_(
        grads, moments, times, dtype, finite, ages, split
    )
    for n, (w, own) in enumerate(zip(work, held, strict=True)):
        write_slots_(w.item, w.state, own, chosen, finite[n] if finite else None)
    return list(zip(directions, corrections, strict=True))


def finite_of(work: Sequence[MatrixStep]) -> list[Tensor]:
    """Flags for ops that select on the device; none where the host has looked."""
    return [w.finite for w in work if w.finite is not None]


def _older_(work: Sequence[MatrixStep], coord: str) -> list[Tensor]:
    """The age of each row, this step included."""
    ages = [w.state[age_key(coord)] for w in work]
    finite = finite_of(work)
    if not finite:
        torch._foreach_add_(ages, 1)
        return ages
    every, fine = torch.stack(ages), torch.stack(finite)
    every.add_(fine.view(-1, *[1] * ages[0].dim()))
    torch._foreach_copy_(ages, list(every.unbind(0)))
    return ages


def inputs_of(w: MatrixStep) -> ResidualInputs | None:
    """What its residual looks at; None where coordinates are not those of a basis."""
    low, subspace = w.coords.get("low"), w.item.subspace
    if low is None or subspace is None:
        return None
    return ResidualInputs(w.grad, low, *w.directions["low"], subspace, w.finite, w.whole)


class Push(NamedTuple):
    """What a subspace adds to the weights, and how."""

    into: Target
    update: dict[str, Tensor]
    term: Term | None


def prepared(
    work: Sequence[MatrixStep],
    chosen: Strategies,
    lr: float | Tensor,
    weight_decay: float,
    undo: Undo,
    rounding: Sequence[Noise | None],
) -> list[Push]:
    """All that phase four needs to know of alike matrices, before it writes.

    Args:
        work: the matrices; their plans may stand for buffers that updates are to be made in.
        chosen: what their group chose.
        lr: of the group.
        weight_decay: likewise.
        undo: what to put back.
        rounding: seed and positions of the weights as they are stored; None rounds to nearest.
    """
    undo.keep_all([w.state for w in work], chosen.residual.stepped)
    terms = _terms(work, chosen)
    sizes = [_step_size(w, chosen, lr) for w in work]
    decays = _each(sizes, lambda size: 1 - size * weight_decay)
    if chosen.lr_scale != 1:
        sizes = _each(sizes, lambda size: size * chosen.lr_scale)
    plain = len(work[0].directions) == 1 and all(isinstance(size, float) for size in sizes)
    updates = [{k: x for k, (x, _) in w.directions.items()} for w in work]
    rates = [1.0] * len(work)
    if plain:
        for n, (w, size) in enumerate(zip(work, sizes, strict=True)):
            ((_, correction),) = w.directions.values()
            assert isinstance(size, float)
            rates[n] = size * correction
    else:
        updates = _times(work, sizes)
        for n, (w, size, term) in enumerate(zip(work, sizes, terms, strict=True)):
            if term is not None and isinstance(size, Tensor):
                terms[n] = term.times(size * w.directions["low"][1])
    lows = [w.coords.get("low") for w in work]
    subspace = work[0].item.subspace
    assert subspace is not None
    if chosen.maximize:
        # coordinates are those of -G, and so is all that is linear in them: turn both back
        for n, (own, term) in enumerate(zip(lows, terms, strict=True)):
            if own is not None and subspace.applies_grad(term):
                updates[n] = {k: -x for k, x in updates[n].items()}
                lows[n], rates[n] = -own, -rates[n]
    ready = []
    for n, w in enumerate(work):
        view = w.item.view
        assert view is not None
        param, noise = view.of(w.item.param), rounding[n]
        noise = None if noise is None else view.noise(noise)
        # where nothing of it is applied the weights stand in: its coordinates alone may exist, or
        # it may be wider than the weights, as with error feedback
        grad = w.grad if subspace.applies_grad(terms[n]) else param
        into = Target(param, grad, lows[n], rates[n], decays[n], noise, w.finite)
        ready.append(Push(into, updates[n], terms[n]))
    return ready


def _terms(work: Sequence[MatrixStep], chosen: Strategies) -> list[Term | None]:
    """What residuals add to the updates."""
    found = [inputs_of(w) for w in work]
    seen = [own for own in found if own is not None]
    if not seen:
        return [None] * len(work)
    measured = [w.measured for w in work if w.measured is not None]
    return chosen.residual.after_all([w.state for w in work], seen, measured)


def _step_size(w: MatrixStep, chosen: Strategies, lr: float | Tensor) -> float | Tensor:
    """The learning rate of one matrix."""
    view, subspace = w.item.view, w.item.subspace
    assert view is not None and subspace is not None
    param = view.of(w.item.param)
    size = chosen.rule.step_size(lr, float(w.state["step"]), param, w.rms)
    if isinstance(size, Tensor) and size.numel() == 1 and not on_accelerator(param):
        size = float(size)
    factor = subspace.lr_factor(int(w.state["step"]) - 1 - max(0, int(w.state["refresh_step"])))
    return size if factor == 1 else size * factor  # never in place: it may be the group's tensor


def _each(
    sizes: Sequence[float | Tensor], call: Callable[[float | Tensor], float | Tensor]
) -> list[float | Tensor]:
    """``call`` of each; of a tensor that several have in common, once."""
    known: dict[int, float | Tensor] = {}
    for size in sizes:
        if id(size) not in known:
            known[id(size)] = call(size)
    return [known[id(size)] for size in sizes]


def _times(work: Sequence[MatrixStep], sizes: Sequence[float | Tensor]) -> list[dict[str, Tensor]]:
    """Directions, each times its correction and its step size."""
    updates: list[dict[str, Tensor]] = [{} for _ in work]
    for name in work[0].directions:
        xs, corrections = zip(*(w.directions[name] for w in work), strict=True)
        if len(work) > 1 and all(s is sizes[0] for s in sizes) and len({*corrections}) == 1:
            scaled = list((stacked(xs) * (corrections[0] * sizes[0])).unbind(0))
        else:
            scaled = [x * (c * s) for x, c, s in zip(xs, corrections, sizes, strict=True)]
        for own, x in zip(updates, scaled, strict=True):
            own[name] = x
    return updates


def push(work: Sequence[MatrixStep], ready: Sequence[Push], chosen: Strategies, undo: Undo) -> None:
    """Write the weights of alike matrices, and what follows them."""
    subspace = work[0].item.subspace
    assert subspace is not None
    subspace.push_all_(
        [own.into for own in ready], [w.state for w in work],
        [own.update for own in ready], [own.term for own in ready],
    )  # fmt: skip
    for w, own in zip(work, ready, strict=True):
        view, param = w.item.view, own.into.param
        assert view is not None
        if not shares_memory(param, w.item.param):
            stored = param.mT if view.flip else param  # strides that allow no matrix view
            w.item.param.copy_(stored.reshape(view.shape))
        chosen.residual.keep_(w.state, w.grad, own.into.finite)
        undo.done(w.state)
