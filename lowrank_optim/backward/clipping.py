"""Clipping of gradients that lie on several ranks: by the norms of one process, alike on all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from lowrank_optim.backward.projecting import matrix_coords
from lowrank_optim.backward.shards import stays_whole
from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.sharded.guard import Asked, agreed
from lowrank_optim.engine.sharded.local import here, summed_coords
from lowrank_optim.engine.sharded.step import refresh_works
from lowrank_optim.engine.sharded.work import Work, chunks_of, fetch, is_projected, is_usable
from lowrank_optim.engine.undo import Undo
from lowrank_optim.sharding import collectives
from lowrank_optim.tensors.projected_grad import Coords, ProjectedGrad


def clip_each_(plans: Sequence[ParamPlan], max_norm: float) -> None:
    """Clip the gradient of each parameter, of several ranks, by its own norm: as many as have one.

    Args:
        plans: the same on every rank.
        max_norm: of each.
    """
    twins = [_in_place(plan) for plan in plans]
    known = agreed([Asked(plan, twin) for plan, twin in zip(plans, twins, strict=True)])
    for plan, twin in zip(plans, twins, strict=True):
        if id(plan.param) in known:
            clip_grads_with_norm_([twin.param], max_norm, known[id(plan.param)].norm)


def clip_together_(
    plans: Sequence[ParamPlan],
    matrices: Sequence[tuple[ParamPlan, State, Strategies]],
    plain: Sequence[Tensor],
    max_norm: float,
) -> None:
    """Clip gradients by the norm of what a step will apply of all of them.

    Of a matrix that is projected it is that of its coordinates, also where what is kept is whole.
    Plain parameters have their gradients from whoever made them; should these differ from rank to
    rank, the mean of their squares still gives all ranks one factor.

    Args:
        plans: of the parameters that lie on several ranks, the same on every rank.
        matrices: those of them that are projected, with bases that are not due.
        plain: the other parameters.
        max_norm: of all gradients together.
    """
    works = {id(w.item.param): w for w in _works(matrices) if stays_whole(w.item)}
    _keep_coords([w for w in works.values() if not is_projected(w)])
    twins = {id(p.param): w.twin for p in plans if (w := works.get(id(p.param)))}
    asked = [Asked(plan, twins.get(id(plan.param)) or _in_place(plan)) for plan in plans]
    norms = [found.norm for found in agreed(asked).values()]
    if plain:
        norms.append(_of_plain(plain, plans[0]))
    if not norms:
        return
    device = norms[0].device
    total = torch.linalg.vector_norm(torch.stack([x.to(device) for x in norms]))
    locals_ = [here(plan).param for plan in plans]
    clip_grads_with_norm_([*locals_, *plain], max_norm, total)


def refresh_ahead(matrices: Sequence[tuple[ParamPlan, State, Strategies]]) -> None:
    """Refresh what is due of several ranks before they step: a step then finds nothing due."""
    with tracing.hosted(), Undo() as undo:
        for plan, _, _ in matrices:
            plan.tried = -1  # a step that failed was undone
        works = _works([own for own in matrices if basis_due(*own)])
        known = agreed([Asked(w.item, w.twin) for w in works])
        works = [w for w in works if id(w.item.param) in known]
        for w in works:
            w.norm = known[id(w.item.param)].norm
            undo.begin(w.state)
        usable = [w for w in works if is_usable(w)]
        refresh_works(chunks_of(usable), [w for w in works if not is_usable(w)], undo)
        for w in works:
            w.item.tried = int(w.state["step"])


def _works(matrices: Sequence[tuple[ParamPlan, State, Strategies]]) -> list[Work]:
    return [
        Work(plan, _in_place(plan), state, chosen, 0.0, 0.0) for plan, state, chosen in matrices
    ]


def _in_place(plan: ParamPlan) -> ParamPlan:
    """What stands for the part that is here, whose gradient lies as its parameter does."""
    grad, part = plan.param.grad, plan.part
    assert part is not None
    if grad is not None and tuple(grad.placements) != part.placements:  # type: ignore[attr-defined]
        plan.param.grad = grad.redistribute(placements=part.placements)  # type: ignore[attr-defined]
    return here(plan)


def _keep_coords(works: Sequence[Work]) -> None:
    """Let the gradients of what stands for whole shards be their coordinates: by messages."""
    for alike in chunks_of([w for w in works if w.twin.param.grad is not None]):
        part, view, subspace = alike[0].item.part, alike[0].item.view, alike[0].twin.subspace
        assert part is not None and view is not None and subspace is not None
        fetch(alike)
        found: list[Coords] = []
        for w in alike:
            assert w.grad is not None
            found.append(matrix_coords(subspace, w.state, w.grad))
            w.grad = None
        summed = summed_coords(subspace, view)
        collectives.sum_([own[name] for own in found for name in summed], part.group)
        for w, own in zip(alike, found, strict=True):
            if part.rank:  # what is the same on all of them is counted by the first
                own |= {name: own[name][..., :0] for name in summed}
            w.twin.param.grad = ProjectedGrad(w.twin.param, own, _none_more)


def _none_more(*_: object) -> None:
    raise AssertionError("coordinates for a norm alone")


def _of_plain(params: Sequence[Tensor], beside: ParamPlan) -> Tensor:
    """The norm of gradients of plain parameters, the same on all ranks of a mesh."""
    part = beside.part
    assert part is not None
    square = torch.zeros((), dtype=torch.float64, device=here(beside).param.device)
    for param in params:
        if param.grad is not None:
            norm: Tensor = torch.linalg.vector_norm(param.grad)
            square += norm.to(square.device, torch.float64).square()
    for group in part.groups:
        square /= group.size()
        collectives.sum_([square], group)
    return square.sqrt()
