"""Bases that one rank finds for all: the matrix goes to it, and what it finds to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.momentum import join_lost_, sought
from lowrank_optim.engine.plan import State, on_host
from lowrank_optim.engine.refresh import NOTHING_FOUND, find_, follow_, postpone_, refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.failures import Failure
from lowrank_optim.engine.sharded.forms import split_dims
from lowrank_optim.engine.sharded.inputs import factors_weight, gathers, inputs_of
from lowrank_optim.ops.devices import on_accelerator, sent
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.subspaces.base import BasisChange
from lowrank_optim.subspaces.projector import Projector, new_to_old
from lowrank_optim.tensors.alive import of_shape


class Ended(NamedTuple):
    """A refresh that all ranks have taken part in, before the host knows what became of it."""

    due: Due
    owner: int
    end: Tensor
    """One of :mod:`lowrank_optim.engine.sharded.failures`, where the matrix is."""
    counts: list[tuple[Tensor, Tensor]]
    """Entries on the host, and what comes into them, there too."""
    last: int
    """``refresh_step`` before it."""
    found: Found | None
    """What became of it on this rank, if it is the owner, without the basis."""


def by_owner(jobs: Sequence[Due | None]) -> list[Ended]:
    """A round: rank i finds the basis of ``jobs[i]``, in the first copy of what they have.

    :func:`settle` follows, once after several rounds, as an accelerator makes its host wait there.
    """
    part = next(d for d in jobs if d is not None).part
    told, found = _from_owners([_shown(d) for d in jobs]) if part.leads else ({}, None)
    if part.copies is not None:
        told = _to_copies(jobs, told, part.copies)
    ended = []
    for owner, d in enumerate(jobs):
        if d is not None:
            last, own = int(d.state["refresh_step"]), told[owner]
            here = None
            if found is not None and owner == part.rank:
                here = Found(found.end, {}, {}, failure=found.failure)
            # no part of a message, which has whole bases: they do not wait for each other
            counts = [(into, new.clone()) for into, new in _follow(d, own)]
            ended.append(Ended(d, owner, own.end.clone(), counts, last, here))
    return ended


def settle(ended: Sequence[Ended]) -> None:
    """Count what was postponed, and raise what an owner raised: one look for all."""
    if not ended:
        return
    news = [x for own in ended for x in (own.end, *(new for _, new in own.counts))]
    joined = torch.cat([x.reshape(-1).view(torch.uint8) for x in news])
    if joined.is_meta:  # a rehearsal, in which every basis is found
        return
    parts = iter(torch.split(joined.cpu(), [x.numel() * x.element_size() for x in news]))
    read = [(int(next(parts)), [next(parts) for _ in own.counts]) for own in ended]
    for own, (end, _) in zip(ended, read, strict=True):
        if end == failures.RAISED:
            failure = None if own.found is None else own.found.failure
            failures.raise_together(own.owner, failure, own.due.part)
    for own, (end, counts) in zip(ended, read, strict=True):
        d, found = own.due, own.found
        if end == failures.FOUND:
            for (x, _), new in zip(own.counts, counts, strict=True):
                x.copy_(new.clone().view(x.dtype).view(x.shape))
            continue
        d.state["refresh_step"].fill_(own.last)
        if found is None:
            d.state["postponed"] += 1
        elif found.end == failures.FOUND:  # its device says otherwise; else it is counted, and said
            postpone_(d.item, d.state, d.step, NOTHING_FOUND)


def _shown(d: Due | None) -> Due | None:
    """With what a basis is found from, of the columns that are here."""
    if d is None or d.grad is None:
        return d
    return d._replace(grad=sought(d.columns, d.state, d.grad, d.chosen))


def _from_owners(jobs: Sequence[Due | None]) -> tuple[dict[int, Told], Found | None]:
    """By owner, what each found, with the pieces of this rank; and what this rank found."""
    some = next(d for d in jobs if d is not None)
    rank, group, device = some.part.rank, some.part.group, some.twin.param.device
    mine = jobs[rank]
    outgoing = [[] if d is None else [x.here for x in inputs_of(d)] for d in jobs]
    incoming: list[list[Form]] = [[] for _ in jobs]
    if mine is not None:
        incoming = [[x.form(source) for x in inputs_of(mine)] for source in range(len(jobs))]
    arrived: list[list[Tensor]] = [[] for _ in jobs]
    if any(outgoing):
        arrived = collectives.exchange(outgoing, incoming, group, device)
    found = None
    if mine is not None:
        try:
            found = _find(mine, arrived)
        except Exception as error:  # memory, say: whoever waits for the basis has to know
            failure = Failure(mine.item.name, error)
            found = Found(failures.RAISED, mine.state, {}, failure=failure)
    told = {
        owner: _sent(d, found if owner == rank else None, owner, group, device)
        for owner, d in enumerate(jobs)
        if d is not None
    }
    _scatter(jobs, mine, found, told, group, device)
    return told, found


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


class Found(NamedTuple):
    """What the owner found."""

    end: int
    """One of :mod:`lowrank_optim.engine.sharded.failures`."""
    entries: State
    """The new basis, whole."""
    moved: dict[str, BasisChange]
    ok: Tensor | None = None
    """Of what was found on an accelerator whether it was, 0-d bool."""
    failure: Failure | None = None
    """Why nothing was."""

    def flag(self, device: torch.device) -> Tensor:
        """How it ended, where it is sent from."""
        if self.ok is None or self.end != failures.FOUND:
            return failures.flag(self.end, device)
        return self.ok.to(torch.uint8).view(1)


def _find(d: Due, arrived: Sequence[Sequence[Tensor]]) -> Found:
    """Put the matrix together, and refresh as one process would."""
    inputs, view = inputs_of(d), d.item.view
    assert view is not None
    whole = [x.together([own[i] for own in arrived]) for i, x in enumerate(inputs)]
    if factors_weight(d):
        return _factored(d, whole[0])
    split = split_dims(d.item, d.chosen)
    state: State = {k: d.state[k].clone() for k in d.entries if k not in split}
    if d.balanced:
        state.update(zip([k for k in d.entries if k in split], whole, strict=True))
        return _balanced(d, state)
    grad = whole.pop(0) if gathers(d) else _as_informative(d).expand(view.m, view.n)
    state.update(zip([k for k in d.entries if k in split], whole, strict=True))
    meta = of_shape(view.shape, d.item.param.dtype)
    plan = replace(d.item, param=meta, part=None)
    counters = {key: d.state[key] for key in ("refresh_step", "postponed")}
    moved, ok = find_(plan, {**state, **counters}, grad, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {}, ok)


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
    counters = {"postponed": d.state["postponed"]}
    moved, ok = find_(plan, {**state, **counters}, weight, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {}, ok)


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
        rotations = [_rotation(found, coord, side, f, device) for coord, side, f in _turns(d)]
        entries = [found.entries[k] for k in keys]
        here = [
            sent(x, device) if x.device != device or on_host(k) else x
            for k, x in zip(keys, entries, strict=True)
        ]
        tensors = [found.flag(device), *here, *rotations]
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


def _rotation(found: Found, coord: str, side: int, f: Form, device: torch.device) -> Tensor:
    if found.end != failures.FOUND:
        return torch.zeros(f.shape, dtype=f.dtype, device=device)
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
                own.append(_piece(found, key, dim, start, stop))
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


def _piece(found: Found, key: str, dim: int, start: int, stop: int) -> Tensor:
    """Of an entry; zeros of its shape where there is none, as others wait for something."""
    x = found.entries[key]
    if found.end == failures.RAISED:  # the entry is that of this rank alone
        return x.new_zeros(*x.shape[:dim], stop - start, *x.shape[dim + 1 :])
    return x.narrow(dim, start, stop - start)


def _split_entries(d: Due) -> dict[str, tuple[int, int]]:
    split = split_dims(d.item, d.chosen)
    return {key: split[key] for key in d.entries if key in split}


def _follow(d: Due, told: Told) -> list[tuple[Tensor, Tensor]]:
    """Keep the new basis, and let the moments that are here follow it.

    An accelerator selects what was there where there is no new one. The host has to know where
    vectors that it switches are those of new factors.

    Returns:
        Entries on the host, and what is to come into them.
    """
    found: Tensor | None = None
    if on_accelerator(told.end) and not d.balanced:
        found = (told.end == failures.FOUND).view(())
    elif told.end.item() != failures.FOUND:
        return []
    old = {key: d.state[key].clone() for key in d.entries}
    held, counts = d.momentum, []
    for key, x in told.entries.items():
        into = d.state[key]
        if on_host(key):
            counts.append((into, x))
        else:
            into.copy_(x if found is None else torch.where(found, x, into))
    if d.balanced:
        seen = (torch.ones(()), True)
        refresh_(d.columns, d.state, d.twin.param, d.step, d.chosen, look=seen)
        return counts
    new = {key: d.state[key] for key in d.entries}
    moved = d.subspace.changed(old, new) or told.moved(d) or _moved_here(old, new)
    if found is not None:
        moved = {coord: _selected(own, found) for coord, own in moved.items()}
    follow_(d.columns, d.state, moved, d.step, d.chosen, ok=found)
    if d.grad is not None:
        join_lost_(held, d.state, d.grad, d.chosen, moved.get("low"))
    return counts


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
