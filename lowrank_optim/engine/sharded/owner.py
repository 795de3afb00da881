"""Bases that one rank finds for all: the matrix goes to it, and what it finds to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.momentum import join_lost_, sought
from lowrank_optim.engine.plan import State, on_host
from lowrank_optim.engine.refresh import find_, follow_, postpone_, refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.failures import Failure
from lowrank_optim.engine.sharded.forms import split_dims
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.sharding.grid import Block, Interval, length
from lowrank_optim.subspaces.base import BasisChange
from lowrank_optim.subspaces.projector import Projector, new_to_old


def by_owner(jobs: Sequence[Due | None]) -> None:
    """A round: rank i finds the basis of ``jobs[i]``, in the first copy of what they have."""
    part = next(d for d in jobs if d is not None).part
    told, failure = _from_owners([_shown(d) for d in jobs]) if part.leads else ({}, None)
    if part.copies is not None:
        told = _to_copies(jobs, told, part.copies)
    for owner, own in told.items():
        if own.end.item() == failures.RAISED:
            failures.raise_together(owner, failure if owner == part.rank else None, part)
    for owner, d in enumerate(jobs):
        if d is not None:
            _follow(d, told[owner], part.leads and owner == part.rank)


def _shown(d: Due | None) -> Due | None:
    """With what a basis is found from, of the columns that are here."""
    if d is None or d.grad is None:
        return d
    return d._replace(grad=sought(d.columns, d.state, d.grad, d.chosen))


def _from_owners(jobs: Sequence[Due | None]) -> tuple[dict[int, Told], Failure | None]:
    """By owner, what each found, with the pieces of this rank; and why this rank found nothing."""
    some = next(d for d in jobs if d is not None)
    rank, group, device = some.part.rank, some.part.group, some.twin.param.device
    mine = jobs[rank]
    outgoing = [[] if d is None else [x.here for x in _inputs(d)] for d in jobs]
    incoming: list[list[Form]] = [[] for _ in jobs]
    if mine is not None:
        incoming = [[x.form(source) for x in _inputs(mine)] for source in range(len(jobs))]
    arrived: list[list[Tensor]] = [[] for _ in jobs]
    if any(outgoing):
        arrived = collectives.exchange(outgoing, incoming, group, device)
    found, failure = None, None
    if mine is not None:
        try:
            found = _find(mine, arrived)
        except Exception as error:  # memory, say: whoever waits for the basis has to know
            failure = Failure(mine.item.name, error)
            found = Found(failures.RAISED, mine.state, {})
    told = {
        owner: _sent(d, found if owner == rank else None, owner, group, device)
        for owner, d in enumerate(jobs)
        if d is not None
    }
    if not any(own.end.item() == failures.RAISED for own in told.values()):
        _scatter(jobs, mine, found, told, group, device)
    return told, failure


def _to_copies(
    jobs: Sequence[Due | None], told: dict[int, Told], copies: dist.ProcessGroup
) -> dict[int, Told]:
    """What the first copy was told, in all of them: one broadcast for the round."""
    some = [(owner, d) for owner, d in enumerate(jobs) if d is not None]
    part, device = some[0][1].part, some[0][1].twin.param.device
    sent: list[Tensor] | None = None
    if part.leads:
        sent = []
        for owner, d in some:
            own = told[owner]
            sent += [own.end, *(own.entries.get(k, d.state[k]) for k in d.entries), *own.turns]
    forms = [
        [failures.FLAG, *(form(d.state[key]) for key in d.entries), *_forms(d)] for _, d in some
    ]
    got = iter(
        collectives.broadcast(sent, [f for own in forms for f in own], part.first, copies, device)
    )
    found = {}
    for owner, d in some:
        end, entries = next(got), {key: next(got) for key in d.entries}
        found[owner] = Told(end, entries, [next(got) for _ in _forms(d)])
    return found


class Input(NamedTuple):
    """What an owner puts together of pieces that ranks have."""

    here: Tensor
    """That of this rank."""
    shape: tuple[int, ...]
    """Of the whole."""
    places: list[tuple[Any, ...]]
    """Index of each rank's piece."""

    def form(self, rank: int) -> Form:
        """Of the piece of one rank."""
        whole = torch.empty(self.shape, device="meta")
        return Form(tuple(whole[self.places[rank]].shape), self.here.dtype)

    def together(self, pieces: Sequence[Tensor]) -> Tensor:
        """The whole."""
        whole = self.here.new_empty(self.shape)
        for place, piece in zip(self.places, pieces, strict=True):
            whole[place] = piece
        return whole


def _along(x: Tensor, dim: int, spans: Sequence[Interval]) -> Input:
    shape = list(x.shape)
    shape[dim] = sum(map(length, spans))
    return Input(x, tuple(shape), [(slice(None),) * dim + (slice(*span),) for span in spans])


def _inputs(d: Due) -> list[Input]:
    """What the owner needs of this rank. Factors of W are all found anew, and of W alone."""
    view, part = d.item.view, d.part
    if _factors_weight(d):
        assert view is not None and d.twin.view is not None
        weight = d.twin.view.of(d.twin.param)
        if part.side == "batch":
            return [_along(weight, 0, part.spans)]
        every = (0, view.m)
        stored = part.grid.stored if part.grid else [Block(every, span) for span in part.spans]
        places = [(..., slice(*rows), slice(*columns)) for rows, columns in stored]
        return [Input(weight, (*view.batch, view.m, view.n), places)]
    split, found = split_dims(d.item, d.chosen), []
    if _gathers(d):
        assert d.grad is not None
        found.append(_along(d.grad, 0 if part.side == "batch" else d.grad.dim() - 1, part.spans))
    keys = [key for key in d.entries if key in split]
    return [*found, *(_along(d.state[key], split[key][0], part.spans) for key in keys)]


def _factors_weight(d: Due) -> bool:
    """Whether the owner needs the weight, and nothing else."""
    return d.subspace.of_weight and not d.balanced


def _gathers(d: Due) -> bool:
    """Whether the owner needs the gradient itself."""
    if d.balanced:
        return False
    remembers = d.chosen.residual.wants == "memory"  # then its norm is known to nobody
    assert d.item.view is not None  # of a batch, matrices without a gradient keep their basis
    return d.subspace.reads_grad or bool(d.item.view.batch) or remembers


class Found(NamedTuple):
    """What the owner found."""

    end: int
    """One of :mod:`lowrank_optim.engine.sharded.failures`."""
    entries: State
    """The new basis, whole."""
    moved: dict[str, BasisChange]


def _find(d: Due, arrived: Sequence[Sequence[Tensor]]) -> Found:
    """Put the matrix together, and refresh as one process would."""
    inputs, view = _inputs(d), d.item.view
    assert view is not None
    whole = [x.together([own[i] for own in arrived]) for i, x in enumerate(inputs)]
    if _factors_weight(d):
        return _factored(d, whole[0])
    split = split_dims(d.item, d.chosen)
    state: State = {k: d.state[k].clone() for k in d.entries if k not in split}
    if d.balanced:
        state.update(zip([k for k in d.entries if k in split], whole, strict=True))
        return _balanced(d, state)
    grad = whole.pop(0) if _gathers(d) else _as_informative(d).expand(view.m, view.n)
    state.update(zip([k for k in d.entries if k in split], whole, strict=True))
    meta = torch.empty(view.shape, dtype=d.item.param.dtype, device="meta")
    plan = replace(d.item, param=meta, part=None)
    counters = {key: d.state[key] for key in ("refresh_step", "postponed")}
    moved = find_(plan, {**state, **counters}, grad, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {})


def _factored(d: Due, weight: Tensor) -> Found:
    """Factors of the whole weight, in the canonical view."""
    view = d.item.view
    assert view is not None
    shape = (*view.batch, view.m, view.n)
    plan = replace(
        d.item, param=weight, view=view._replace(shape=shape, flip=False), part=None, local=None
    )
    state = d.subspace.init(view, weight)
    state.update({k: d.state[k].clone() for k in state if on_host(k)})
    moved = find_(plan, {**state, "postponed": d.state["postponed"]}, weight, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {})


def _balanced(d: Due, state: State) -> Found:
    """Entries that were made of themselves."""
    try:
        d.subspace.balance_(state)
    except LinAlgError as error:
        postpone_(d.item, d.state, d.step, str(error))
        return Found(failures.POSTPONED, state, {})
    return Found(failures.FOUND, state, {})


def _as_informative(d: Due) -> Tensor:
    """A number that is 0, or not finite, where the whole gradient is: all that is looked at."""
    assert d.norm is not None and d.grad is not None
    return torch.where(d.norm > 0, d.norm / d.norm, d.norm).to(d.grad.dtype)


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
        for (coord, side, _), x in zip(_turns(d), self.turns, strict=True):
            change, turn = found.get(coord, BasisChange()), partial(_itself, x)
            found[coord] = change._replace(right=turn) if side else change._replace(rotation=turn)
        return found


def _sent(
    d: Due, found: Found | None, owner: int, group: dist.ProcessGroup, device: torch.device
) -> Told:
    """What the owner found, on every rank; split entries are not in it yet."""
    split = split_dims(d.item, d.chosen)
    keys = [k for k in d.entries if k not in split]
    tensors = None
    if found is not None:
        rotations = [_rotation(found, coord, side, f) for coord, side, f in _turns(d)]
        tensors = [failures.flag(found.end), *(found.entries[k] for k in keys), *rotations]
    forms = [failures.FLAG, *(form(d.state[k]) for k in keys), *_forms(d)]
    end, *rest = collectives.broadcast(tensors, forms, owner, group, device)
    return Told(end, dict(zip(keys, rest, strict=False)), rest[len(keys) :])


def _forms(d: Due) -> list[Form]:
    """Of the rotations."""
    return [f for _, _, f in _turns(d)]


def _itself(x: Tensor) -> Tensor:
    return x


def _turns(d: Due) -> list[tuple[str, int, Form]]:
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


def _rotation(found: Found, coord: str, side: int, f: Form) -> Tensor:
    if found.end != failures.FOUND:
        return torch.zeros(f.shape, dtype=f.dtype)
    turn = found.moved[coord].right if side else found.moved[coord].rotation
    assert turn is not None
    return turn()


def _scatter(
    jobs: Sequence[Due | None],
    mine: Due | None,
    found: Found | None,
    told: dict[int, Told],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Each rank's pieces of entries that are split, into what it got: one all-to-all, if any."""
    outgoing: list[list[Tensor]] = [[] for _ in jobs]
    if mine is not None and found is not None:
        for key, (dim, _) in _split_entries(mine).items():
            for own, (start, stop) in zip(outgoing, mine.part.spans, strict=True):
                own.append(found.entries[key].narrow(dim, start, stop - start))
    incoming = [
        [] if d is None else [form(d.state[key]) for key in _split_entries(d)] for d in jobs
    ]
    if not any(incoming):
        return
    arrived = collectives.exchange(outgoing, incoming, group, device)
    for owner, result in told.items():
        d = jobs[owner]
        assert d is not None
        result.entries.update(zip(_split_entries(d), arrived[owner], strict=True))


def _split_entries(d: Due) -> dict[str, tuple[int, int]]:
    split = split_dims(d.item, d.chosen)
    return {key: split[key] for key in d.entries if key in split}


def _follow(d: Due, told: Told, here: bool) -> None:
    """Keep the new basis, and let the moments that are here follow it."""
    if told.end.item() != failures.FOUND:
        if not here:  # the owner has counted it, and said why
            d.state["postponed"] += 1
        return
    old = {key: d.state[key].clone() for key in d.entries}
    held = d.momentum
    for key, x in told.entries.items():
        d.state[key].copy_(x)
    if d.balanced:
        seen = (torch.ones(()), True)
        refresh_(d.columns, d.state, d.twin.param, d.step, d.chosen, look=seen)
        return
    new = {key: d.state[key] for key in d.entries}
    moved = d.subspace.changed(old, new) or told.moved(d) or _moved_here(old, new)
    follow_(d.columns, d.state, moved, d.step, d.chosen)
    if d.grad is not None:
        join_lost_(held, d.state, d.grad, d.chosen, moved.get("low"))


def _moved_here(old: State, new: State) -> dict[str, BasisChange]:
    """Rotations between bases of which all is here."""

    def turn(key: str) -> Callable[[], Tensor] | None:
        return (lambda: new_to_old(new[key], old[key])) if key in new else None

    return {"low": BasisChange(turn("basis"), turn("basis_right"))}
