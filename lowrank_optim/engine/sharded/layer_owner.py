"""Layers of factors that one rank refreshes for all: factors go to it, and come back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.answers import expecting_
from lowrank_optim.engine.plan import ParamPlan, State, Strategies, on_host
from lowrank_optim.engine.refresh import counters_of, finding, following_
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.due import merged
from lowrank_optim.engine.sharded.failures import Ended, Failure
from lowrank_optim.engine.sharded.layers import everyone, pieces, places_of
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.sharding.groups import coordinates_over, group_over
from lowrank_optim.sharding.parts import local, replica
from lowrank_optim.subspaces.searches import Searching, alone, together
from lowrank_optim.tensors.values import set_counter_

logger = logging.getLogger(__name__)


class FirstRank:
    """The first rank of a mesh: what it factors, all have.

    A factorisation on two ranks differs in its last bits where their hardware differs.

    Args:
        like: a DTensor of the mesh.
    """

    def __init__(self, like: Tensor) -> None:
        self._group = group_over(like.device_mesh, everyone(like))  # type: ignore[attr-defined]

    @property
    def here(self) -> bool:
        """Whether this rank is that one."""
        return dist.get_rank(self._group) == 0

    def tell(self, tensors: Sequence[Tensor], error: LinAlgError | None) -> list[Tensor]:
        """What the first rank has, on every rank.

        Raises:
            LinAlgError: the first rank has an error. Not on accelerators, which no host asks for
                that: the first rank says so, and all go on.
        """
        device, forms = tensors[0].device, [*map(form, tensors)]
        asks = not on_accelerator(tensors[0])
        flags = [torch.tensor([error is None], dtype=torch.uint8)] if asks else []
        sent = [*flags, *tensors] if self.here else None
        forms = [failures.FLAG, *forms] if asks else forms
        found = collectives.broadcast(sent, forms, 0, self._group, device)
        if asks and not bool(found.pop(0).item()):
            raise LinAlgError(str(error or "the first rank could not factor it"))
        if error is not None:
            logger.warning("factors of a layer stay unbalanced: %s", error)
        return found


class DueLayer(NamedTuple):
    """A layer that is to be refreshed."""

    item: ParamPlan
    whole: Callable[[State], ParamPlan]
    """What stands for it where a state has the whole factors too."""
    factors: dict[str, Tensor]
    """DTensors that the refresh reads and writes."""
    kept: State
    """What every rank has alike of its state."""
    chosen: Strategies

    @property
    def nbytes(self) -> int:
        """Of all factors."""
        return sum(x.numel() * x.element_size() for x in self.factors.values())

    @property
    def told(self) -> list[str]:
        """What ranks are told of what they have alike; numbers of the host each knows itself."""
        return [key for key in sorted(self.kept) if not on_host(key)]


class Refreshed(NamedTuple):
    """What an owner has of a layer, afterwards."""

    state: State
    end: int
    ok: Tensor | None = None
    failure: Failure | None = None

    def flag(self, device: torch.device) -> Tensor:
        """How it ended, where it is sent from."""
        if self.ok is None or self.end != failures.FOUND:
            return failures.flag(self.end, device)
        return self.ok.to(torch.uint8).view(1)


def refresh_by_owners(due: Sequence[DueLayer]) -> None:
    """Refresh layers of one mesh, each on one rank, which share what it asks for.

    Factors go to their owner and come back, and the owner tells all what became of the rest.
    """
    if not due:
        return
    first: Any = next(iter(due[0].factors.values()))
    group, device = group_over(first.device_mesh, everyone(first)), local(first).device
    size = group.size()
    rounds = (due[i : i + size] for i in range(0, len(due), size))
    padded = ([d for d, _ in zip_longest(own, range(size))] for own in rounds)
    work = merged(padded, lambda d: d.nbytes)
    ended = [x for queues in work for x in _round(queues, first, group, device)]
    failures.settle(ended, replica(None, group, ()))


def _round(
    queues: Sequence[Sequence[DueLayer]], like: Any, group: dist.ProcessGroup, device: torch.device
) -> list[Ended]:
    """Rank i refreshes ``queues[i]``."""
    rank, order = dist.get_rank(group), coordinates_over(like.device_mesh, everyone(like))
    mine = queues[rank]
    parts = [[pieces(x, everyone(like), order) for d in own for x in d.factors.values()]
             for own in queues]  # fmt: skip
    arrived = collectives.exchange(
        [[x.here for x in own] for own in parts],
        [[x.form(source) for x in parts[rank]] for source in range(group.size())],
        group,
        device,
    )
    wholes = (x.together([own[i] for own in arrived]) for i, x in enumerate(parts[rank]))
    states = [{**_copies(d), **{key: next(wholes) for key in d.factors}} for d in mine]
    done = _refreshed(mine, states)
    told = [
        _sent(own, done if owner == rank else None, owner, group, device)
        for owner, own in enumerate(queues)
    ]
    outgoing: list[list[Tensor]] = [[] for _ in queues]
    for d, after in zip(mine, done, strict=True):
        for key, x in d.factors.items():
            for own, place in zip(outgoing, places_of(x, order), strict=True):
                own.append(after.state[key][place])
    incoming = [[form(local(x)) for d in own for x in d.factors.values()] for own in queues]
    back = collectives.exchange(outgoing, incoming, group, device)
    ended = []
    for owner, (its, news, came) in enumerate(zip(queues, told, map(iter, back), strict=True)):
        for n, (d, (end, *entries)) in enumerate(zip(its, news, strict=True)):
            pairs = [*zip([d.kept[key] for key in d.told], entries, strict=True)]
            pairs += [(local(x), next(came)) for x in d.factors.values()]
            _follow(d, end, pairs)
            failure = done[n].failure if owner == rank else None
            ended.append(Ended(d.item.param, owner, end.clone(), failure))
    return ended


def _copies(d: DueLayer) -> State:
    """What is alike on all ranks, which take what became of it from a message."""
    return {key: x.clone() for key, x in d.kept.items()}


def _refreshed(mine: Sequence[DueLayer], states: Sequence[State]) -> list[Refreshed]:
    try:
        return together([_refreshing(d, x) for d, x in zip(mine, states, strict=True)])
    except Exception as error:  # of a call that they share
        failure = Failure(f"{mine[0].item.name} or one like it", error)
        return [Refreshed(x, failures.RAISED, failure=failure) for x in states]


def _refreshing(d: DueLayer, state: State) -> Searching[Refreshed]:
    plan = d.whole(state)
    step, chosen = int(state["step"]), d.chosen
    try:
        moved, ok = yield from finding(plan, state, plan.param, step, chosen)
        if moved is None:
            return Refreshed(state, failures.POSTPONED)
        yield from following_(plan, state, moved, step, chosen, ok=ok)
    except Exception as error:  # memory, say: whoever waits for the factors has to know
        return Refreshed(state, failures.RAISED, failure=Failure(d.item.name, error))
    return Refreshed(state, failures.FOUND, ok)


def _sent(
    own: Sequence[DueLayer],
    done: Sequence[Refreshed] | None,
    owner: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[Tensor]]:
    """How each of its refreshes ended, and what all have alike: one broadcast of an owner."""
    if not own:
        return []
    sent = None
    if done is not None:
        sent = [x for d, after in zip(own, done, strict=True)
                for x in (after.flag(device), *(after.state[key] for key in d.told))]  # fmt: skip
    forms = [[failures.FLAG, *(form(d.kept[key]) for key in d.told)] for d in own]
    flat: list[Form] = [f for each in forms for f in each]
    got: Iterator[Tensor] = iter(collectives.broadcast(sent, flat, owner, group, device))
    return [[next(got) for _ in each] for each in forms]


def _follow(d: DueLayer, end: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Keep what came, and count; nothing of an owner that raised.

    An accelerator selects, and its host asks a step later; until then it counts as found.
    """
    selects = on_accelerator(end)
    if not selects and int(end) != failures.FOUND:
        d.kept["postponed"] += int(end) == failures.POSTPONED
        return
    last, before = int(d.kept["refresh_step"]), counters_of(d.item, d.kept)
    lost = (end == failures.RAISED).view(()) if selects else None
    for x, new in pairs:
        x.copy_(new if lost is None else torch.where(lost, x, new))
    set_counter_(d.kept["refresh_step"], int(d.kept["step"]))
    for key, count in before.items():
        set_counter_(d.kept[key], count + 1)
    if selects:
        found = (end == failures.FOUND).view(())
        alone(expecting_(d.kept, d.item.name, found, last, True, before))
