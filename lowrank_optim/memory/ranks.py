"""Which of several ranks may need more memory than the first, told from the run of the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.engine.sharded.due import Share, Shares, shares_seen
from lowrank_optim.memory.figures import Estimate
from lowrank_optim.memory.turns import over_first
from lowrank_optim.memory.twins import Make, over_twins
from lowrank_optim.memory.world import Shard, World, pretended
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.grid import chunk, length


class _Rank(NamedTuple):
    """What a rank has."""

    held: tuple[int, ...]
    """Sizes of its shards, and of what it steps."""
    owned: tuple[tuple[Share, ...], ...]
    """Of what it finds bases, each time that ranks do so together."""

    def within(self, other: _Rank) -> bool:
        """Whether it needs no more than another."""
        smaller = all(a <= b for a, b in zip(self.held, other.held, strict=True))
        return smaller and all(map(_within, self.owned, other.owned))


def ranks_apart(
    size: int, params: Sequence[Tensor], optimizer: Optimizer, seen: Iterable[Shares]
) -> dict[int, bool]:
    """Ranks that may need more than the first, and whether their shards are as large as its.

    A rank needs no more than another whose shards are as large or larger, and that finds bases of
    as many matrices, each as large or larger. Every rank knows of which matrices each finds them.

    Args:
        size: how many ranks there are.
        params: shards of the model.
        optimizer: over what stands for them.
        seen: what each rank was the owner of as the first took its steps.
    """
    shares = [own for own in seen if len(own) == size]
    if not shares:  # the first has most of whatever is shared unevenly
        return {}
    first, *others = (
        _Rank(_held(rank, size, params, optimizer), tuple(own[rank] for own in shares))
        for rank in range(size)
    )
    found: dict[int, _Rank] = {0: first}
    for rank, own in enumerate(others, 1):
        if any(own.within(other) for other in found.values()):
            continue
        found = {n: x for n, x in found.items() if n == 0 or not x.within(own)} | {rank: own}
    return {rank: own.held == first.held for rank, own in found.items() if rank > 0}


def of_ranks(
    of_rank: Callable[[dict[Any, Any], World], Estimate],
    size: int,
    shard: Shard | None,
    make: Callable[[nn.Module], Make],
) -> Estimate:
    """What the first rank holds, and beside it the worst moments of any.

    Args:
        of_rank: estimates one of the ranks, and keeps what it finds of it.
        size: how many there are.
        shard: shards a model.
        make: makes the optimizer over what stands for the parameters of a sharded model.
    """
    known: dict[Any, Any] = {}
    with pretended(size, shard) as world, shares_seen() as seen:
        found = {0: of_rank(known, world)}
        params = list(known["sharded"].parameters())
        _, optimizer = over_twins(params, make(known["sharded"]))
        apart = ranks_apart(size, params, optimizer, seen)
    for rank, alike in apart.items():
        with pretended(size, shard, rank) as world:
            flights = {"flights": known["flights"]} if alike else {}
            found[rank] = of_rank(flights, world)
    return over_ranks(found)


def over_ranks(found: Mapping[int, Estimate]) -> Estimate:
    """What the first rank holds, beside it the worst moments of any, and whose peak is highest."""
    worst = max(found, key=lambda rank: found[rank].peak)
    return replace(over_first([*found.values()]), rank=worst)


def _within(some: Sequence[Share], more: Sequence[Share]) -> bool:
    """Whether each of some matrices has one of its kind, as large or larger, among others."""
    if len(some) > len(more):
        return False
    return all(
        a.kind == b.kind
        and len(a.sizes) == len(b.sizes)
        and all(x <= y for x, y in zip(a.sizes, b.sizes, strict=True))
        for a, b in zip(some, more, strict=False)
    )


def _held(rank: int, size: int, params: Sequence[Tensor], optimizer: Optimizer) -> tuple[int, ...]:
    steps = list[Any]()
    if isinstance(optimizer, LowRankOptimizer):
        items = (item for group in optimizer.param_groups for item in optimizer._items(group))
        steps = [item.part.spans[rank] for item in items if item.part and item.part.spans]
    return (*(_shard(rank, size, p) for p in params), *map(length, steps))


def _shard(rank: int, size: int, param: Any) -> int:
    """How much a rank has of the dimension that is split, as ``torch.chunk`` does it."""
    (place,) = param.placements
    return length(chunk(param.shape[place.dim], size, rank)) if place.is_shard() else 0
