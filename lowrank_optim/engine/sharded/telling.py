"""What ranks are told of what an owner found, and what each makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.engine.answers import expecting_
from lowrank_optim.engine.momentum import join_lost_
from lowrank_optim.engine.plan import State
from lowrank_optim.engine.refresh import counters_of, refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.state import on_host
from lowrank_optim.engine.transport import following_
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding.collectives import Form
from lowrank_optim.subspaces.projector import Projector, new_to_old
from lowrank_optim.subspaces.refresh import BasisChange
from lowrank_optim.subspaces.searches import alone
from lowrank_optim.tensors.values import set_counter_


class Told(NamedTuple):
    """What ranks are told of what an owner found."""

    end: Tensor
    """One of :mod:`lowrank_optim.engine.sharded.failures`."""
    entries: State
    """The new basis; entries that are split as this rank has them."""
    turns: list[Tensor]
    """Rotations that moments follow."""

    def moved(self, d: Due) -> dict[str, BasisChange]:
        """How coordinates moved, where a rotation tells."""
        found: dict[str, BasisChange] = {}
        for (coord, side, _), x in zip(turns_of(d), self.turns, strict=True):
            change, turn = found.get(coord, BasisChange()), partial(_itself, x)
            found[coord] = change._replace(right=turn) if side else change._replace(rotation=turn)
        return found


def _itself(x: Tensor) -> Tensor:
    return x


def turns_of(d: Due) -> list[tuple[str, int, Form]]:
    """Rotations that moments follow: coordinate, side (0 rows, 1 columns), form."""
    if (
        d.part.side == "batch"
        or d.balanced
        or d.chosen.on_refresh != "project"
        or int(d.state["refresh_step"]) < 0
    ):
        return []
    view, subspace = d.item.view, d.subspace
    if not isinstance(subspace, Projector) or subspace.indexed:
        return []
    assert view is not None
    (basis,) = (d.state[k] for k in d.entries[:1])
    dtype = torch.promote_types(basis.dtype, torch.float32)
    square = Form((*view.batch, subspace.rank, subspace.rank), dtype)
    return [("low", side, square) for side in range(1 + subspace.two_sided)]


def follow(d: Due, told: Told) -> None:
    """Keep the new basis, and let the moments that are here follow it.

    An accelerator selects what was there where there is no new one, and its host asks a step later
    whether there is; until then it counts as found.
    """
    found: Tensor | None = None
    if on_accelerator(told.end):
        found = (told.end == failures.FOUND).view(())
    elif (end := int(told.end)) != failures.FOUND:
        d.state["postponed"] += end == failures.POSTPONED
        return
    last: int | None = int(d.state["refresh_step"])
    before = {} if d.balanced else counters_of(d.item, d.state)
    old = {key: d.state[key].clone() for key in d.entries}
    held = d.momentum
    for key, x in told.entries.items():
        into = d.state[key]
        if key in before and found is not None:
            set_counter_(into, int(into) + 1)
        else:
            into.copy_(x if found is None or on_host(key) else torch.where(found, x, into))
    if d.balanced:  # factors that could not be balanced serve as they are
        seen, last = (torch.ones(()), True), None
        refresh_(d.columns, d.state, d.twin.param, d.step, d.chosen, look=seen)
    else:
        moved = _moved(d, told, old, found)
        alone(following_(d.columns, d.state, moved, d.step, d.chosen, ok=found))
        if d.grad is not None:
            join_lost_(held, d.state, d.grad, d.chosen, moved.get("low"))
    if found is not None:
        alone(expecting_(d.state, d.item.name, found, last, True, before))


def _moved(d: Due, told: Told, old: State, found: Tensor | None) -> dict[str, BasisChange]:
    """How coordinates moved; where nothing was found, they stay."""
    new = {key: d.state[key] for key in d.entries}
    moved = d.subspace.changed(old, new) or told.moved(d) or _moved_here(old, new)
    if found is None:
        return moved
    return {coord: _selected(own, found) for coord, own in moved.items()}


def _selected(own: BasisChange, found: Tensor) -> BasisChange:
    """Where nothing was found, indices of coordinates that stay."""

    def stays(source: Tensor | None) -> Tensor | None:
        if source is None:
            return None
        same = torch.arange(source.shape[-1], dtype=source.dtype, device=source.device)
        return torch.where(found, source, same)

    return own._replace(source=stays(own.source), source_right=stays(own.source_right))


def _moved_here(old: State, new: State) -> dict[str, BasisChange]:
    """Rotations between bases of which all is here."""

    def turn(key: str) -> Callable[[], Tensor] | None:
        return (lambda: new_to_old(new[key], old[key])) if key in new else None

    return {"low": BasisChange(turn("basis"), turn("basis_right"))}
