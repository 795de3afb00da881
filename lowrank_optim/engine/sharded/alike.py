"""What every rank has alike, refreshed by one of them: it works on copies, and all get the result.

Numbers of the host each rank advances by itself. An accelerator selects what was there where an
owner raised, and is asked a step later what came about; until then that counts as found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.answers import expecting_
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import counters_of, finding, postpone_, refresh_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.failures import Ended, Failure
from lowrank_optim.engine.state import on_host
from lowrank_optim.engine.transport import following_
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import form
from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.searches import Searching, alone, together
from lowrank_optim.tensors.values import set_counter_


class Alike(NamedTuple):
    """A matrix that is due, of whose state every rank has the same."""

    item: ParamPlan
    kept: State
    """What all have."""
    told: Sequence[str]
    """Keys of what a refresh may change of it, but for numbers that each rank advances."""
    chosen: Strategies
    shown: Callable[[State], tuple[ParamPlan, Tensor]]
    """What is refreshed, and the gradient that it is shown, where the owner works on a state."""

    @property
    def step(self) -> int:
        """Steps taken before."""
        return int(self.kept["step"])

    @property
    def subspace(self) -> Subspace:
        """Its subspace."""
        assert self.item.subspace is not None
        return self.item.subspace

    @property
    def balanced(self) -> Sequence[str]:
        """Entries that the owner makes of themselves; each rank does the rest of the refresh."""
        return self.subspace.balanced(self.step)

    @property
    def nbytes(self) -> int:
        """Of what ranks are told."""
        return sum(self.kept[key].nbytes for key in self.told)

    def copies(self) -> State:
        """For the owner to work on: an error leaves what there is as it was."""
        copied = {*self.told, "refresh_step", "postponed", *self.subspace.counters}
        return {key: x.clone() if key in copied else x for key, x in self.kept.items()}


class Refreshed(NamedTuple):
    """What an owner has, afterwards."""

    state: State
    end: int
    """One of :mod:`lowrank_optim.engine.sharded.failures`."""
    ok: Tensor | None = None
    """Of what was found on an accelerator whether it was, 0-d bool."""
    failure: Failure | None = None

    def flag(self, device: torch.device) -> Tensor:
        """How it ended, where it is sent from."""
        return failures.flag(self.end, self.ok, device)


def refreshed(mine: Sequence[Alike], states: Sequence[State]) -> list[Refreshed]:
    """Refresh what this rank owns, equal matrices at once; what is raised is in the result."""
    try:
        return together([_refreshing(d, x) for d, x in zip(mine, states, strict=True)])
    except Exception as error:  # memory, say, of a call that they share
        failure = Failure(f"{mine[0].item.name} or one like it", error)
        return [Refreshed(x, failures.RAISED, failure=failure) for x in states]


def _refreshing(d: Alike, state: State) -> Searching[Refreshed]:
    try:
        if d.balanced:
            return (yield from _balancing(d, state))
        plan, grad = d.shown(state)
        moved, ok = yield from finding(plan, state, grad, d.step, d.chosen)
        if moved is None:
            return Refreshed(state, failures.POSTPONED)
        yield from following_(plan, state, moved, d.step, d.chosen, ok=ok)
    except Exception as error:
        return Refreshed(state, failures.RAISED, failure=Failure(d.item.name, error))
    return Refreshed(state, failures.FOUND, ok)


def _balancing(d: Alike, state: State) -> Searching[Refreshed]:
    try:
        yield from d.subspace.balancing_(state)
    except LinAlgError as error:
        postpone_(d.item, state, d.step, str(error))
        return Refreshed(state, failures.POSTPONED)
    return Refreshed(state, failures.FOUND)


def sent(
    own: Sequence[Alike],
    done: Sequence[Refreshed] | None,
    owner: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """How each of an owner's refreshes ended, and what changed: one broadcast.

    Args:
        own: what it owns.
        done: what became of it, on that rank.
        owner: its place in the group.
        group: the ranks.
        device: where the matrices are.
    """
    if not own:
        return []
    # what rests in the memory of the host has to be there at once
    hosts = [(n, key) for n, d in enumerate(own) for key in d.told if on_host(key)]
    keys = [[key for key in d.told if not on_host(key)] for d in own]
    tensors = None
    if done is not None:
        tensors = [done[n].state[key] for n, key in hosts]
        for names, after in zip(keys, done, strict=True):
            tensors += [after.flag(device), *(after.state[key] for key in names)]
    forms = [form(own[n].kept[key]) for n, key in hosts]
    for d, names in zip(own, keys, strict=True):
        forms += [failures.FLAG, *(form(d.kept[key]) for key in names)]
    got = iter(collectives.broadcast(tensors, forms, owner, group, device, len(hosts)))
    here = {place: next(got) for place in hosts}
    found = []
    for n, (d, names) in enumerate(zip(own, keys, strict=True)):
        end, there = next(got), {key: next(got) for key in names}
        found.append([end, *(here.get((n, key), there.get(key)) for key in d.told)])
    return found  # type: ignore[return-value]


def follow(
    d: Alike, end: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], rank: int, done: Failure | None
) -> Ended:
    """Keep what came, and count.

    Args:
        d: the matrix.
        end: how its refresh ended.
        pairs: what is here, and what is to come into it.
        rank: of the owner.
        done: what it raised, on that rank.
    """
    selects = on_accelerator(end)
    ended = Ended(d.item.param, rank, end.clone(), done)
    if not selects and int(end) != failures.FOUND:
        d.kept["postponed"] += int(end) == failures.POSTPONED
        return ended
    last: int | None = int(d.kept["refresh_step"])
    before = {} if d.balanced else counters_of(d.item, d.kept)
    lost = (end == failures.RAISED).view(()) if selects else None
    for x, new in pairs:
        if lost is None or (x.device != lost.device and not bool(lost)):  # in the host's memory
            x.copy_(new)
        elif x.device == lost.device:
            x.copy_(torch.where(lost, x, new))
    if d.balanced:  # factors that could not be balanced serve as they are
        seen, last = (torch.ones(()), True), None
        refresh_(d.item, d.kept, d.item.param, d.step, d.chosen, look=seen)
    else:
        set_counter_(d.kept["refresh_step"], d.step)
        for key, count in before.items():
            set_counter_(d.kept[key], count + 1)
    if selects:
        found = (end == failures.FOUND).view(())
        alone(expecting_(d.kept, d.item.name, found, last, True, before))
    return ended
