"""Phases one and two of a step: bases that are due are refreshed, then coordinates are taken."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.bucket import chunk_size
from lowrank_optim.engine.matrix_step import MatrixStep, begun, mark, turn_
from lowrank_optim.engine.momentum import join_lost_, momentum_of
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import keep_refreshed, refreshing_
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.subspaces.searches import Searching, together
from lowrank_optim.tensors.projected_grad import ProjectedGrad

SEARCH_BYTES = 1 << 26
"""Low-rank gradients of matrices of an accelerator whose bases are fitted at once: a search holds
several tensors as large as a basis of each."""

_Found = tuple[Tensor, dict[str, Tensor], Tensor | None]
"""A gradient, the coordinates that are known already, and whether it is finite, where a device has
said so."""


def measure(work: Sequence[MatrixStep]) -> None:
    """Norms of all coordinates, one call for each; of gradients that they do not see whole."""
    if not work:
        return
    if work[0].item.subspace is not None and not work[0].item.subspace.sees_all:
        norms = [ops.total_norms([w.grad for w in work])]
    else:
        norms = _norms([[w.coords[name] for w in work] for name in work[0].coords])
    for w, *own in zip(work, *norms, strict=True):
        w.norm = own[0]
    if len(norms) > 1:
        totals = torch.stack([x for own in norms for x in own]).view(len(norms), -1).sum(0)
        for w, total in zip(work, totals.unbind(0), strict=True):
            w.norm = total
    first = [w for w in work if not w.based]
    if first:
        for w, norm in zip(first, ops.total_norms([w.grad for w in first]), strict=True):
            w.norm = w.norm + norm  # finite if both are
    if on_accelerator(work[0].grad):
        mark(work)


def _norms(lists: Sequence[Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Norms of each of several equally long lists: one call for all that are of one dtype."""
    if len(lists) == 1:
        return [ops.total_norms([*lists[0]])]
    found: dict[int, Sequence[Tensor]] = {}
    count = len(lists[0])
    for dtype in dict.fromkeys(own[0].dtype for own in lists):
        at = [n for n, own in enumerate(lists) if own[0].dtype == dtype]
        norms = ops.total_norms([x for n in at for x in lists[n]])
        found |= {n: norms[i * count : (i + 1) * count] for i, n in enumerate(at)}
    return [found[n] for n in range(len(lists))]


def project(
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
    if any(due):
        keep_refreshed(list(compress(pairs, due)), chosen, undo)
    work = list(zip(pairs, _gradients(pairs, chosen), strict=True))
    searches = [_refreshed(*pair, grad, chosen) for pair, grad in compress(work, due)]
    size = _searched_at_once(pairs, due, chosen)
    parts = (searches[i : i + size] for i in range(0, len(searches), size))
    refreshed = (x for part in parts for x in together(part))
    found = [
        next(refreshed) if own else _kept(*pair, grad, chosen)
        for (pair, grad), own in zip(work, due, strict=True)
    ]
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


def _kept(
    item: ParamPlan, state: State, grad: Tensor | ProjectedGrad, chosen: Strategies
) -> _Found:
    """What is known of a matrix whose basis is not due."""
    if not isinstance(grad, ProjectedGrad):
        held, item.before = item.before, None
        join_lost_(held, state, grad, chosen)
        return grad, {}, None
    # taken inside backward
    state.update(grad.fresh)
    if int(state["refresh_step"]) < 0:
        state["postponed"] += 1  # no gradient yet that says something
    coords = {k: x.clone() if chosen.maximize else x for k, x in grad.coords.items()}
    return grad, coords, None


def _refreshed(
    item: ParamPlan, state: State, grad: Tensor, chosen: Strategies
) -> Searching[_Found]:
    """What is known of a matrix whose basis is due, and what a search for it has said."""
    moved: dict[str, BasisChange] = {}
    held, item.before = item.before, None
    if chosen.residual.lost:
        held = momentum_of(item, state, chosen, copied=True)
    step = int(state["step"])
    yield from refreshing_(item, state, grad, step, chosen, moved, later=True)
    join_lost_(held, state, grad, chosen)
    coords = {k: own.low for k, own in moved.items() if own.low is not None}
    said = (own.finite for own in moved.values() if own.finite is not None)
    return grad, coords, next(said, None)
