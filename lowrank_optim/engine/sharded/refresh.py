"""Refreshes that ranks share: one rank finds a basis, all have it, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowrank_optim.engine import answers
from lowrank_optim.engine.momentum import join_lost_
from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import on_host
from lowrank_optim.engine.refresh import refresh_, refreshing_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import Due, owners, rounds_of
from lowrank_optim.engine.sharded.failures import Failure
from lowrank_optim.engine.sharded.owner import by_owner
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import form
from lowrank_optim.subspaces.searches import Searching, together


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
        ended = [x for queues in rounds_of(owned) for x in by_owner(queues)]
        failures.settle(ended, own[0].part)
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
        look = scores.sum(), scores  # the same on all ranks, each of which asks its device later
        refresh_(d.columns, d.state, d.grad, d.step, d.chosen, look=look, later=True)


def refresh_replicas(due: Sequence[Due]) -> None:
    """Refresh matrices that every rank has whole: one broadcast from each owner.

    The same factorisation on two ranks differs in its last bits where their threads or their
    hardware differ, and a sign, or a choice, makes that large.
    """
    if not due:
        return
    held = [d.momentum if d.grad is not None else None for d in due]
    rank, group, device = due[0].part.rank, due[0].part.group, due[0].twin.param.device
    for owner, own in enumerate(owners(due)):
        if not own:
            continue
        failure = _refresh_own(own) if owner == rank else None
        here: list[Tensor] = []
        there: list[Tensor] = []
        for d in own:
            for key in _copied(d):
                (here if on_host(key, d.chosen.capturable) else there).append(d.state[key])
        entries = [*here, *there]
        end = failures.flag(failures.FOUND if failure is None else failures.RAISED)
        tensors = [end, *entries] if owner == rank else None
        forms = [failures.FLAG, *(form(x) for x in entries)]
        # what the host has to know comes at once
        end, *got = collectives.broadcast(tensors, forms, owner, group, device, 1 + len(here))
        if int(end.item()) == failures.RAISED:
            failures.raise_together(owner, failure, own[0].part)
        if owner != rank:
            for x, new in zip(entries, got, strict=True):
                x.copy_(new)
    for d, before in zip(due, held, strict=True):
        if d.grad is not None:
            join_lost_(before, d.state, d.grad, d.chosen)


def _refresh_own(own: Sequence[Due]) -> Failure | None:
    """Refresh what this rank owns, equal matrices at once; what it could not, and why."""
    try:
        failed = [x for x in together([*map(_refreshing, own)]) if x is not None]
    except Exception as error:  # memory, say, of a call that they share
        return Failure(f"{own[0].item.name} or one like it", error)
    for d in own:
        answers.settle_(d.state)  # others are told: the first waits for the device
    return next(iter(failed), None)


def _refreshing(d: Due) -> Searching[Failure | None]:
    try:
        yield from refreshing_(d.twin, d.state, _whole_gradient(d), d.step, d.chosen, later=True)
    except Exception as error:
        return Failure(d.item.name, error)
    return None


def _whole_gradient(d: Due) -> Tensor:
    """All of it is here; made when it is needed, as error feedback makes a matrix of its own."""
    if d.grad is not None:
        return d.grad
    if not d.subspace.needs_grad:
        return d.twin.param
    assert d.twin.view is not None and d.twin.param.grad is not None
    residual = d.chosen.residual
    with on_device(d.item, d.state, d.chosen, residual.memory):
        return residual.before(d.state, d.twin.view.of(d.twin.param.grad))


def _copied(d: Due) -> list[str]:
    """What a refresh may have changed of a state that every rank has."""
    if d.subspace.of_weight or d.chosen.on_refresh != "keep":
        kept = ("step", *d.chosen.residual.memory)  # which a refresh does not write
        return [key for key in d.state if key not in kept]
    return [*d.entries, "refresh_step", "postponed"]
