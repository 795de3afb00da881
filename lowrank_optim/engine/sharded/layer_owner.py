"""Layers of factors that one rank refreshes for all: factors go to it, and come back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded import failures
from lowrank_optim.engine.sharded.alike import Alike, follow, refreshed, sent
from lowrank_optim.engine.sharded.due import merged
from lowrank_optim.engine.sharded.failures import Ended
from lowrank_optim.engine.sharded.layers import everyone, pieces, places_of
from lowrank_optim.engine.state import on_host
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import form
from lowrank_optim.sharding.groups import coordinates_over, group_over
from lowrank_optim.sharding.parts import local, replica

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
        shown = [*flags, *tensors] if self.here else None
        forms = [failures.FLAG, *forms] if asks else forms
        found = collectives.broadcast(shown, forms, 0, self._group, device)
        if asks and not bool(found.pop(0).item()):
            raise LinAlgError(str(error or "the first rank could not factor it"))
        if error is not None:
            logger.warning("factors of a layer stay unbalanced: %s", error)
        return found


class DueLayer(NamedTuple):
    """A layer that is to be refreshed."""

    alike: Alike
    """What every rank has of it: all but the factors."""
    factors: dict[str, Tensor]
    """DTensors that the refresh reads and writes."""

    @property
    def nbytes(self) -> int:
        """Of all factors."""
        return sum(x.numel() * x.element_size() for x in self.factors.values())


def due_layer(
    item: ParamPlan,
    kept: State,
    factors: dict[str, Tensor],
    chosen: Strategies,
    whole: Callable[[State], ParamPlan],
) -> DueLayer:
    """A layer that is to be refreshed.

    Args:
        item: of its first factor.
        kept: what every rank has of its state.
        factors: DTensors.
        chosen: of its group.
        whole: what stands for it where a state has the whole factors too.
    """

    def shown(state: State) -> tuple[ParamPlan, Tensor]:
        plan = whole(state)
        return plan, plan.param

    told = [key for key in sorted(kept) if not on_host(key)]
    return DueLayer(Alike(item, kept, told, chosen, shown), factors)


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
    work = merged(padded, lambda d: d.nbytes, local(first))
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
    states = [{**d.alike.copies(), **{key: next(wholes) for key in d.factors}} for d in mine]
    done = refreshed([d.alike for d in mine], states) if mine else []
    told = [
        sent([d.alike for d in own], done if owner == rank else None, owner, group, device)
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
            pairs = [*zip([d.alike.kept[key] for key in d.alike.told], entries, strict=True)]
            pairs += [(local(x), next(came)) for x in d.factors.values()]
            failure = done[n].failure if owner == rank else None
            ended.append(follow(d.alike, end, pairs, owner, failure))
    return ended
