"""Refreshes that ranks share: one rank finds a basis, all have it, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from lowrank_optim.engine.momentum import join_lost_, sought
from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import ParamPlan, State
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.alike import Alike, follow, refreshed, sent
from lowrank_optim.engine.sharded.due import Due, merged, owners, rounds_of
from lowrank_optim.engine.sharded.owner import by_owner
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import form
from lowrank_optim.sharding.parts import Part


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
        shown, forms = found if part.leads else None, [form(x) for x in found]
        found = collectives.broadcast(shown, forms, part.first, part.copies, found[0].device)
    for (d, _), scores in zip(scored, found, strict=True):
        assert d.grad is not None
        look = scores.sum(), scores  # the same on all ranks, each of which asks its device later
        refresh_(d.columns, d.state, d.grad, d.step, d.chosen, look=look, later=True)


def refresh_replicas(due: Sequence[Due]) -> None:
    """Refresh matrices that every rank has whole: one broadcast from each owner, a round.

    The same factorisation on two ranks differs in its last bits where their threads or their
    hardware differ, and a sign, or a choice, makes that large.
    """
    if not due:
        return
    held = [d.momentum if d.grad is not None else None for d in due]
    part, device = due[0].part, due[0].twin.param.device
    rounds = zip_longest(*([_alike(d) for d in own] for own in owners(due)))
    work = merged(rounds, lambda d: d.nbytes, due[0].twin.param)
    ended = [x for queues in work for x in _round(queues, part, device)]
    failures.settle(ended, part)
    for d, before in zip(due, held, strict=True):
        if d.grad is not None:
            join_lost_(before, d.state, d.grad, d.chosen)


def _round(
    queues: Sequence[Sequence[Alike]], part: Part, device: torch.device
) -> list[failures.Ended]:
    """Rank i refreshes ``queues[i]``."""
    mine, ended = queues[part.rank], []
    done = refreshed(mine, [d.copies() for d in mine]) if mine else []
    for owner, own in enumerate(queues):
        here = done if owner == part.rank else None
        told = sent(own, here, owner, part.group, device)
        for n, (d, (end, *entries)) in enumerate(zip(own, told, strict=True)):
            pairs = [*zip([d.kept[key] for key in d.told], entries, strict=True)]
            ended.append(follow(d, end, pairs, owner, here[n].failure if here else None))
    return ended


def _alike(d: Due) -> Alike:
    def shown(state: State) -> tuple[ParamPlan, Tensor]:
        grad = _whole_gradient(d)
        return d.twin, sought(d.twin, state, grad, d.chosen)

    return Alike(d.item, d.state, _copied(d), d.chosen, shown)


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
    """What a refresh may have changed of a state that every rank has, beside what all count."""
    if d.balanced:
        return list(d.balanced)
    counted = ("step", "refresh_step", "postponed", *d.subspace.counters)
    if d.subspace.of_weight or d.chosen.on_refresh != "keep":
        kept = (*counted, *d.chosen.residual.memory)  # which a refresh does not write
        return [key for key in d.state if key not in kept]
    return [key for key in d.entries if key not in counted]
