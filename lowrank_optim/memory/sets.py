"""Tensors that take turns to hold moments, some at a time: which sets of a run hold most."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.engine.plan import ParamPlan, Strategies
from lowrank_optim.engine.sharded.local import meta_state
from lowrank_optim.engine.state import active_blocks
from lowrank_optim.memory.twins import Make
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import local
from lowrank_optim.subspaces.block import Block

SWITCHES = 1000
"""Sets that are looked at: those of so many turns from the first step on."""

Begun = tuple[int, ...]
"""How often the blocks of each group have switched before the first step."""


@dataclass(frozen=True)
class _Begun(Block):
    """A block whose group begins with a later set."""

    begun: int = 0

    def draw(self, switches: int) -> int:
        """As of so many switches more."""
        return super().draw(switches + self.begun)

    def active(self, switches: int, generator: torch.Generator) -> frozenset[int]:
        """Likewise."""
        return super().active(switches + self.begun, generator)


def worst_sets(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Begun]:
    """The first sets, those that hold most, and those before the switches at which most is held.

    A step in which sets switch holds the moments of both until the first block has been stepped,
    which inside backward needs most if it is that block's turn. Which sets a run has is known from
    its seed and from the names of its parameters. Groups of different gaps are taken to have their
    worst sets at once.

    Args:
        optimizer: over what stands for the parameters.
        params: that, in the order of the model.
    """
    if not isinstance(optimizer, LowRankOptimizer):
        return [()]
    number = {p: i for i, p in enumerate(params)}
    sizes: dict[int, list[list[int]]] = {}
    gaps = [0] * len(optimizer.param_groups)
    for at, group in enumerate(optimizer.param_groups):
        chosen = optimizer._strategies(group)
        blocks = [i for i in optimizer._items(group) if _switches(i) and optimizer._trains(i.param)]
        if blocks:
            gaps[at] = chosen.gap
            blocks.sort(key=lambda item: -number[item.param])  # as backward comes by them
            own = _bytes_of_turns(blocks, chosen)
            sizes[chosen.gap] = [
                [a + b for a, b in zip(*both, strict=True)]
                for both in zip(
                    own, sizes.get(chosen.gap, [[0] * len(x) for x in own]), strict=True
                )
            ]
    found = [tuple(_largest(sizes[gap][kind]) if gap else 0 for gap in gaps) for kind in range(3)]
    return list(dict.fromkeys([(0,) * len(gaps), *found]))


def beginning(make: Make, begun: Begun) -> Make:
    """What makes an optimizer that begins with these sets."""

    def made(places: Mapping[int, nn.Parameter]) -> Optimizer:
        optimizer = make(places)
        assert isinstance(optimizer, LowRankOptimizer)
        for group, count in zip(optimizer.param_groups, begun, strict=True):
            for item in optimizer._items(group):
                block = item.subspace
                if isinstance(block, Block):
                    own = {f.name: getattr(block, f.name) for f in fields(block)}
                    item.subspace = _Begun(**own, begun=count)
        return optimizer

    return made if any(begun) else make


def _switches(item: ParamPlan) -> bool:
    """Whether it is a tensor that takes turns; layers that do have turns of their own."""
    block = item.subspace
    return isinstance(block, Block) and block.layers is None and 0 < block.size < block.count


def _bytes_of_turns(blocks: Sequence[ParamPlan], chosen: Strategies) -> list[list[int]]:
    """Moments of each set; with those that the next brings; and where the first block is in it."""
    known: dict[Hashable, int] = {}
    sizes: dict[int, int] = {}
    for item in blocks:
        assert isinstance(item.subspace, Block)
        kind = (item.param.shape, item.param.dtype, local(item.param).shape)
        if kind not in known:
            known[kind] = _moments(item, chosen)
        sizes[item.subspace.position] = known[kind]
    first = next(iter(sizes))
    turns = [active_blocks(blocks[0], chosen, n) for n in range(SWITCHES)]
    again = chosen.on_refresh == "reset"
    held, moved, inside = list[int](), list[int](), list[int]()
    for old, new in zip(turns, [*turns[1:], turns[-1]], strict=True):
        held.append(sum(sizes.get(x, 0) for x in old))
        moved.append(held[-1] + sum(sizes.get(x, 0) for x in (new if again else new - old)))
        inside.append(moved[-1] if first in new else 0)
    moved[-1] = inside[-1] = 0  # none comes after it
    return [held, moved, inside]


def _moments(item: ParamPlan, chosen: Strategies) -> int:
    """Bytes that a block has in its turn alone."""
    active, idle = (
        sum(
            local(x).nbytes for x in meta_state(item, chosen, own).values() if isinstance(x, Tensor)
        )
        for own in (True, False)
    )
    return active - idle


def _largest(sizes: Sequence[int]) -> int:
    """The first of the largest."""
    return max(range(len(sizes)), key=sizes.__getitem__)
