"""Bases that one rank finds for all: matrices go to it, and what it finds to all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_optim.engine.momentum import sought
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import Due
from lowrank_optim.engine.sharded.failures import Ended
from lowrank_optim.engine.sharded.finding import Found, find_all
from lowrank_optim.engine.sharded.forms import split_dims
from lowrank_optim.engine.sharded.inputs import inputs_of
from lowrank_optim.engine.sharded.telling import Told, follow, turns_of
from lowrank_optim.engine.state import on_host
from lowrank_optim.ops.devices import sent
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form

Queues = Sequence[Sequence[Due]]
"""By rank, what it is the owner of."""


def by_owner(queues: Queues) -> list[Ended]:
    """A round: rank i finds the bases of ``queues[i]``, in the first copy of what they have.

    How they ended is for :func:`lowrank_optim.engine.sharded.failures.settle`, after all rounds.
    """
    some = next(d for own in queues for d in own)
    part, device = some.part, some.twin.param.device
    shown = [[_shown(d) for d in own] for own in queues]
    told, found = _from_owners(shown, device) if part.leads else ([], [])
    if part.copies is not None:
        told = _to_copies(queues, told, part.copies, device)
    ended = []
    for owner, (own, news) in enumerate(zip(queues, told, strict=True)):
        for n, (d, new) in enumerate(zip(own, news, strict=True)):
            follow(d, new)
            failure = found[n].failure if found and owner == part.rank else None
            # no part of a message, which has whole bases: it may be read a step later
            ended.append(Ended(d.item.param, owner, new.end.clone(), failure))
    return ended


def _shown(d: Due) -> Due:
    """With what a basis is found from, of the columns that are here."""
    if d.grad is None:
        return d
    return d._replace(grad=sought(d.columns, d.state, d.grad, d.chosen))


def _from_owners(queues: Queues, device: torch.device) -> tuple[list[list[Told]], list[Found]]:
    """By owner, what each found, with the pieces of this rank; and what this rank found."""
    part = next(d for own in queues for d in own).part
    rank, group = part.rank, part.group
    mine = queues[rank]
    outgoing = [[x.here for d in own for x in inputs_of(d)] for own in queues]
    inputs = [inputs_of(d) for d in mine]
    incoming = [[x.form(i) for own in inputs for x in own] for i in range(len(queues))]
    arrived: list[list[Tensor]] = [[] for _ in queues]
    if any(outgoing):
        arrived = collectives.exchange(outgoing, incoming, group, device)
    found = find_all(mine, inputs, arrived) if mine else []
    told = [
        _sent(own, found if owner == rank else None, owner, group, device)
        for owner, own in enumerate(queues)
    ]
    _scatter(queues, rank, found, told, group, device)
    return told, found


def _sent(
    own: Sequence[Due],
    found: Sequence[Found] | None,
    owner: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Told]:
    """What an owner found, on every rank: one broadcast. Split entries are not in it yet."""
    if not own:
        return []
    tensors = None
    if found is not None:
        tensors = [x for d, new in zip(own, found, strict=True) for x in _message(d, new, device)]
    forms = [f for d in own for f in _forms(d, _unsplit(d))]
    got = iter(collectives.broadcast(tensors, forms, owner, group, device))
    return [_received(d, _unsplit(d), got) for d in own]


def _message(d: Due, found: Found, device: torch.device) -> list[Tensor]:
    entries = [(key, found.entries[key]) for key in _unsplit(d)]
    here = [sent(x, device) if x.device != device or on_host(k) else x for k, x in entries]
    turns = [found.turn(coord, side, f, device) for coord, side, f in turns_of(d)]
    return [found.flag(device), *here, *turns]


def _forms(d: Due, keys: Sequence[str]) -> list[Form]:
    """Of what ranks are told of a matrix: how it ended, entries, and rotations."""
    turns = [f for _, _, f in turns_of(d)]
    return [failures.FLAG, *(form(d.state[key]) for key in keys), *turns]


def _received(d: Due, keys: Sequence[str], got: Iterator[Tensor]) -> Told:
    end, entries = next(got), {key: next(got) for key in keys}
    return Told(end, entries, [next(got) for _ in turns_of(d)])


def _to_copies(
    queues: Queues,
    told: Sequence[Sequence[Told]],
    copies: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Told]]:
    """What the first copy was told, in all of them: one broadcast for the round."""
    part = next(d for own in queues for d in own).part
    tensors: list[Tensor] | None = None
    if part.leads:
        tensors = []
        for own, news in zip(queues, told, strict=True):
            for d, new in zip(own, news, strict=True):
                entries = [new.entries.get(key, d.state[key]) for key in d.entries]
                tensors += [new.end, *entries, *new.turns]
    forms = [f for own in queues for d in own for f in _forms(d, d.entries)]
    got = iter(collectives.broadcast(tensors, forms, part.first, copies, device))
    return [[_received(d, d.entries, got) for d in own] for own in queues]


def _scatter(
    queues: Queues,
    rank: int,
    found: Sequence[Found],
    told: Sequence[Sequence[Told]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Each rank's pieces of entries that are split, into what it got: one all-to-all, if any."""
    incoming = [[form(d.state[key]) for d in own for key in _split(d)] for own in queues]
    if not any(incoming):
        return
    outgoing: list[list[Tensor]] = [[] for _ in queues]
    for d, new in zip(queues[rank], found, strict=True):
        for key, (dim, _) in _split(d).items():
            for own, (start, stop) in zip(outgoing, d.part.spans, strict=True):
                own.append(_piece(new, key, dim, start, stop))
    arrived = collectives.exchange(outgoing, incoming, group, device)
    for its, news, came in zip(queues, told, map(iter, arrived), strict=True):
        for d, known in zip(its, news, strict=True):
            known.entries.update({key: next(came) for key in _split(d)})


def _piece(found: Found, key: str, dim: int, start: int, stop: int) -> Tensor:
    """Of an entry; zeros of its shape where there is none, as others wait for something."""
    x = found.entries[key]
    if found.end == failures.RAISED:  # the entry is that of this rank alone
        return x.new_zeros(*x.shape[:dim], stop - start, *x.shape[dim + 1 :])
    return x.narrow(dim, start, stop - start)


def _split(d: Due) -> dict[str, tuple[int, int]]:
    """Entries of the basis of which each rank has a part."""
    split = split_dims(d.item, d.chosen)
    return {key: split[key] for key in d.entries if key in split}


def _unsplit(d: Due) -> list[str]:
    """The others."""
    split = _split(d)
    return [key for key in d.entries if key not in split]
