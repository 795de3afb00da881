"""Refreshes that ranks share: one rank finds a basis, all have it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.plan import ParamPlan, State, Strategies, on_host
from lowrank_optim.engine.refresh import find_, follow_, postpone_, refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.failures import Failure
from lowrank_optim.engine.sharded.forms import split_dims
from lowrank_optim.engine.sharded.local import stepped
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.sharding.grid import Block, Interval, length
from lowrank_optim.sharding.parts import Part
from lowrank_optim.subspaces.base import BasisChange, Projector, Subspace, new_to_old


class Due(NamedTuple):
    """A matrix whose basis is due."""

    item: ParamPlan
    twin: ParamPlan
    """What stands for the part that is here."""
    state: State
    grad: Tensor | None
    """The columns that are here, where a refresh looks at them."""
    chosen: Strategies
    norm: Tensor | None = None
    """Of its whole gradient, where ranks have agreed on it."""

    @property
    def step(self) -> int:
        """Steps taken before."""
        return int(self.state["step"])

    @property
    def columns(self) -> ParamPlan:
        """What stands for the part that is stepped."""
        return stepped(self.item, self.twin.param)

    @property
    def part(self) -> Part:
        """What is here."""
        assert self.item.part is not None
        return self.item.part

    @property
    def subspace(self) -> Subspace:
        """Its subspace."""
        assert self.item.subspace is not None
        return self.item.subspace

    @property
    def balanced(self) -> Sequence[str]:
        """Entries that an owner makes of themselves; the rest of the refresh needs no other."""
        return self.subspace.balanced(self.step)

    @property
    def entries(self) -> list[str]:
        """State keys of what an owner finds."""
        if self.balanced:
            return list(self.balanced)
        assert self.item.view is not None
        meta = torch.empty(self.item.view.shape, dtype=self.item.param.dtype, device="meta")
        return list(self.subspace.init(self.item.view, meta))


def refresh_together(due: Sequence[Due]) -> None:
    """Refresh all of them; each in the way that asks for the fewest messages.

    ========= ==================================== ===========================================
    way       of                                   messages
    ========= ==================================== ===========================================
    alone     drawn sets: columns, rows            none
    scores    dct, hadamard by columns             one all-reduce of m scores, for all of them
    owner     a basis that is found                the matrix to its owner, the basis to all
    owner     factors of W, or of themselves       those to their owner, and the new ones back
    replicas  a matrix that every rank has         the basis, from its owner to all
    ========= ==================================== ===========================================

    Where a mesh has copies of what is split, scores are added up and bases found in the first copy
    alone, and one broadcast takes them to the others.
    """
    by_group: dict[tuple[int, int], list[Due]] = {}
    for d in due:
        by_group.setdefault((id(d.part.group), id(d.part.copies)), []).append(d)
    for own in by_group.values():
        scored, owned, copied = [], [], []
        for d in own:
            if d.subspace.reproducible(d.step):
                refresh_(d.columns, d.state, d.twin.param, d.step, d.chosen)
            elif d.part.side == "whole":
                copied.append(d)
            else:
                scores = d.subspace.scores(d.grad) if d.part.summed and d.grad is not None else None
                if scores is None:
                    owned.append(d)
                else:
                    scored.append((d, scores))
        _by_scores(scored)
        for jobs in _rounds(owned):
            _by_owner(jobs)
        refresh_replicas(copied)


def _by_scores(scored: Sequence[tuple[Due, Tensor]]) -> None:
    if not scored:
        return
    part, found = scored[0][0].part, [scores for _, scores in scored]
    if part.leads:
        collectives.sum_(found, part.group)
    if part.copies is not None:
        sent, forms = found if part.leads else None, [form(x) for x in found]
        found = collectives.broadcast(sent, forms, part.first, part.copies, found[0].device)
    for (d, _), scores in zip(scored, found, strict=True):
        assert d.grad is not None
        refresh_(d.columns, d.state, d.grad, d.step, d.chosen, look=(scores.sum(), scores))


def owners(due: Sequence[Due]) -> list[list[Due]]:
    """What each rank of their group refreshes: the longest first, to who has least to do."""
    queues: list[list[Due]] = [[] for _ in range(due[0].part.ranks)]
    loads = [0] * len(queues)
    for d in sorted(due, key=lambda d: (-d.item.param.numel(), d.item.uid)):
        owner = loads.index(min(loads))
        queues[owner].append(d)
        loads[owner] += d.item.param.numel()
    return queues


def _rounds(due: Sequence[Due]) -> Iterator[tuple[Due | None, ...]]:
    """One matrix for each rank at a time: no more of a gradient is ever gathered."""
    if due:
        yield from zip_longest(*owners(due))


# ---------------------------------------------------------------- by owner


def _by_owner(jobs: Sequence[Due | None]) -> None:
    """A round: rank i finds the basis of ``jobs[i]``, in the first copy of what they have."""
    part = next(d for d in jobs if d is not None).part
    told, failure = _from_owners(jobs) if part.leads else ({}, None)
    if part.copies is not None:
        told = _to_copies(jobs, told, part.copies)
    for owner, own in told.items():
        if own.end.item() == failures.RAISED:
            failures.raise_together(owner, failure if owner == part.rank else None, part)
    for owner, d in enumerate(jobs):
        if d is not None:
            _follow(d, told[owner], part.leads and owner == part.rank)


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
    moved = find_(plan, {**state, "postponed": d.state["postponed"]}, grad, d.step, d.chosen)
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
    for key, x in told.entries.items():
        d.state[key].copy_(x)
    if d.balanced:
        seen = (torch.ones(()), True)
        refresh_(d.columns, d.state, d.twin.param, d.step, d.chosen, look=seen)
        return
    new = {key: d.state[key] for key in d.entries}
    moved = d.subspace.changed(old, new) or told.moved(d) or _moved_here(old, new)
    follow_(d.columns, d.state, moved, d.step, d.chosen)


def _moved_here(old: State, new: State) -> dict[str, BasisChange]:
    """Rotations between bases of which all is here."""

    def turn(key: str) -> Callable[[], Tensor] | None:
        return (lambda: new_to_old(new[key], old[key])) if key in new else None

    return {"low": BasisChange(turn("basis"), turn("basis_right"))}


# ---------------------------------------------------------------- replicas


def refresh_replicas(due: Sequence[Due]) -> None:
    """Refresh matrices that every rank has whole: one broadcast from each owner.

    The same factorisation on two ranks differs in its last bits where their threads or their
    hardware differ, and a sign, or a choice, makes that large.
    """
    if not due:
        return
    rank, group, device = due[0].part.rank, due[0].part.group, due[0].twin.param.device
    for owner, own in enumerate(owners(due)):
        if not own:
            continue
        failure = _refresh_own(own) if owner == rank else None
        entries = [d.state[key] for d in own for key in _copied(d)]
        end = failures.flag(failures.FOUND if failure is None else failures.RAISED)
        tensors = [end, *entries] if owner == rank else None
        forms = [failures.FLAG, *(form(x) for x in entries)]
        end, *got = collectives.broadcast(tensors, forms, owner, group, device)
        if int(end.item()) == failures.RAISED:
            failures.raise_together(owner, failure, own[0].part)
        if owner != rank:
            for x, new in zip(entries, got, strict=True):
                x.copy_(new)


def _refresh_own(own: Sequence[Due]) -> Failure | None:
    """Refresh what this rank owns; what it could not, and why."""
    for d in own:
        try:
            refresh_(d.twin, d.state, _whole_gradient(d), d.step, d.chosen)
        except Exception as error:
            return Failure(d.item.name, error)
    return None


def _whole_gradient(d: Due) -> Tensor:
    """All of it is here; made when it is needed, as error feedback makes a matrix of its own."""
    if not d.subspace.needs_grad:
        return d.twin.param
    assert d.twin.view is not None and d.twin.param.grad is not None
    return d.chosen.residual.before(d.state, d.twin.view.of(d.twin.param.grad))


def _copied(d: Due) -> list[str]:
    """What a refresh may have changed of a state that every rank has."""
    if d.subspace.of_weight or d.chosen.on_refresh != "keep":
        return [key for key in d.state if key != "step"]
    return [*d.entries, "refresh_step", "postponed"]
