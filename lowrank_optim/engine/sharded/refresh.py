"""Refreshes that ranks share: one rank finds a basis, all have it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import find_, follow_, refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.failures import Failure
from lowrank_optim.engine.sharded.local import split_dims, stepped, widths
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form
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
    def entries(self) -> list[str]:
        """State keys of the basis."""
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
    replicas  a matrix that every rank has         the basis, from its owner to all
    ========= ==================================== ===========================================
    """
    by_group: dict[int, list[Due]] = {}
    for d in due:
        by_group.setdefault(id(d.part.group), []).append(d)
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
    collectives.sum_([scores for _, scores in scored], scored[0][0].part.group)
    for d, scores in scored:
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
    """A round: rank i finds the basis of ``jobs[i]``."""
    some = next(d for d in jobs if d is not None)
    rank, group, device = some.part.rank, some.part.group, some.twin.param.device
    mine = jobs[rank]
    outgoing = [[] if d is None else [x for x, _ in _inputs(d)] for d in jobs]
    incoming: list[list[Form]] = [[] for _ in jobs]
    if mine is not None:
        incoming = [
            [_part_form(x, dim, _sizes(mine)[source]) for x, dim in _inputs(mine)]
            for source in range(len(jobs))
        ]
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
    got = {
        owner: _sent(d, found if owner == rank else None, owner, group, device)
        for owner, d in enumerate(jobs)
        if d is not None
    }
    for owner, result in got.items():
        if result.end == failures.RAISED:
            failures.raise_together(owner, failure if owner == rank else None, group)
    _scatter(jobs, mine, found, got, group, device)
    for owner, result in got.items():
        d = jobs[owner]
        assert d is not None
        _follow(d, result, owner == rank)


def _inputs(d: Due) -> list[tuple[Tensor, int]]:
    """What the owner needs of this rank, and the dimension along which ranks have pieces."""
    split = split_dims(d.item, d.chosen)
    found = []
    if _gathers(d):
        assert d.grad is not None
        found.append((d.grad, 0 if d.part.side == "batch" else d.grad.dim() - 1))
    return found + [(d.state[key], split[key][0]) for key in d.entries if key in split]


def _gathers(d: Due) -> bool:
    """Whether the owner needs the gradient itself."""
    remembers = d.chosen.residual.wants == "memory"  # then its norm is known to nobody
    assert d.item.view is not None  # of a batch, matrices without a gradient keep their basis
    return d.subspace.reads_grad or bool(d.item.view.batch) or remembers


def _sizes(d: Due) -> Sequence[int]:
    assert d.item.view is not None
    return d.part.sizes if d.part.side == "batch" else widths(d.part, d.item.view)


def _part_form(x: Tensor, dim: int, size: int) -> Form:
    shape = list(x.shape)
    shape[dim] = size
    return Form(tuple(shape), x.dtype)


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
    assert view is not None and d.grad is not None
    whole = [torch.cat([own[i] for own in arrived], dim) for i, (_, dim) in enumerate(inputs)]
    grad = whole.pop(0) if _gathers(d) else _as_informative(d).expand(view.m, view.n)
    split = split_dims(d.item, d.chosen)
    state: State = {k: d.state[k].clone() for k in d.entries if k not in split}
    state.update(zip([k for k in d.entries if k in split], whole, strict=True))
    meta = torch.empty(view.shape, dtype=d.item.param.dtype, device="meta")
    plan = replace(d.item, param=meta, part=None)
    moved = find_(plan, {**state, "postponed": d.state["postponed"]}, grad, d.step, d.chosen)
    end = failures.POSTPONED if moved is None else failures.FOUND
    return Found(end, state, moved or {})


def _as_informative(d: Due) -> Tensor:
    """A number that is 0, or not finite, where the whole gradient is: all that is looked at."""
    assert d.norm is not None and d.grad is not None
    return torch.where(d.norm > 0, d.norm / d.norm, d.norm).to(d.grad.dtype)


def _sent(
    d: Due, found: Found | None, owner: int, group: dist.ProcessGroup, device: torch.device
) -> Found:
    """What the owner found, on every rank; split entries are not in it yet."""
    split = split_dims(d.item, d.chosen)
    keys = [k for k in d.entries if k not in split]
    turns = [] if d.part.side == "batch" else _turns(d)
    forms = [failures.FLAG, *(form(d.state[k]) for k in keys), *(f for _, _, f in turns)]
    tensors = None
    if found is not None:
        rotations = [_rotation(found, coord, side, f) for coord, side, f in turns]
        tensors = [failures.flag(found.end), *(found.entries[k] for k in keys), *rotations]
    end, *rest = collectives.broadcast(tensors, forms, owner, group, device)
    entries = dict(zip(keys, rest, strict=False))
    moved: dict[str, BasisChange] = {c: BasisChange() for c, side, _ in turns if not side}
    for (coord, side, _), x in zip(turns, rest[len(keys) :], strict=True):
        turn = partial(_itself, x)
        change = moved[coord]
        moved[coord] = change._replace(right=turn) if side else change._replace(rotation=turn)
    return Found(int(end.item()), entries, moved)


def _itself(x: Tensor) -> Tensor:
    return x


def _turns(d: Due) -> list[tuple[str, int, Form]]:
    """Rotations that moments follow: coordinate, side (0 rows, 1 columns), form."""
    if d.chosen.on_refresh != "project" or int(d.state["refresh_step"]) < 0:
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
    got: dict[int, Found],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Each rank's pieces of entries that are split, into what it got: one all-to-all, if any."""
    outgoing: list[list[Tensor]] = [[] for _ in jobs]
    if mine is not None and found is not None:
        for key, (dim, _) in _split_entries(mine).items():
            pieces = torch.split(found.entries[key], list(_sizes(mine)), dim)
            for own, piece in zip(outgoing, pieces, strict=True):
                own.append(piece)
    incoming = [
        [] if d is None else [form(d.state[key]) for key in _split_entries(d)] for d in jobs
    ]
    if not any(incoming):
        return
    arrived = collectives.exchange(outgoing, incoming, group, device)
    for owner, result in got.items():
        d = jobs[owner]
        assert d is not None
        result.entries.update(zip(_split_entries(d), arrived[owner], strict=True))


def _split_entries(d: Due) -> dict[str, tuple[int, int]]:
    split = split_dims(d.item, d.chosen)
    return {key: split[key] for key in d.entries if key in split}


def _follow(d: Due, found: Found, here: bool) -> None:
    """Keep the new basis, and let the moments that are here follow it."""
    if found.end != failures.FOUND:
        if not here:  # the owner has counted it, and said why
            d.state["postponed"] += 1
        return
    old = {key: d.state[key].clone() for key in d.entries}
    for key, x in found.entries.items():
        d.state[key].copy_(x)
    new = {key: d.state[key] for key in d.entries}
    moved = d.subspace.changed(old, new) or found.moved or _moved_here(old, new)
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
            failures.raise_together(owner, failure, group)
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
    if d.subspace.whole is not None or d.chosen.on_refresh != "keep":
        return [key for key in d.state if key != "step"]
    return [*d.entries, "refresh_step", "postponed"]
