"""Which matrices of a rehearsed step need the same memory, so that some of them stand for all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_optim.engine.bucket import bucketed
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.subspaces.block import Block


def kind_of(item: ParamPlan) -> Hashable:
    """What items of a group that are stepped alike have in common."""
    p = item.param
    return item.kind, type(item.subspace), p.shape, p.stride(), p.dtype


def _form(chunk: Sequence[ParamPlan], due: Mapping[Tensor, bool]) -> Hashable:
    """What chunks of a group that need the same memory have in common."""
    if isinstance(chunk[0].subspace, Block):
        return id(chunk[0])
    return kind_of(chunk[0]), len(chunk), sum(due[item.param] for item in chunk)


def told_apart(
    items: Sequence[ParamPlan], chosen: Any, due: Mapping[Tensor, bool], *, apart: bool
) -> list[Sequence[ParamPlan]]:
    """The chunks of a step that can need memory of their own, in turn.

    What a chunk needs depends on its form, and on the copies that chunks before it have left for
    others to take (:class:`lowrank_optim.engine.undo.Undo`). A chunk makes its copies before
    anything else, so that another of its form that follows needs what it did, and leaves as much as
    it finds. A dense parameter neither leaves nor takes any.
    """
    key = (lambda i: (i.key[:3], due[i.param])) if apart else (lambda i: i.key)
    found: list[tuple[Hashable, Sequence[ParamPlan]]] = []
    dense: set[Hashable] = set()
    for chunk in bucketed(items, chosen, key):
        form = _form(chunk, due)
        if chunk[0].subspace is None:
            if form in dense:
                continue
            dense.add(form)
        elif found and found[-1][0] == form:
            continue
        found.append((form, chunk))
    return [chunk for _, chunk in found]
