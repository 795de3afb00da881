"""Layers that train a few at a time: which turns there can be, and an optimizer held at one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_optim.groups.layers import layers_of
from lowrank_optim.memory.figures import Estimate
from lowrank_optim.memory.twins import Make
from lowrank_optim.methods.lisa import _Layers
from lowrank_optim.subspaces.block import Block

Turn = Mapping[Block, frozenset[int]]
"""Places of the layers that train, by what groups say of their turns."""
DRAWN = ("random", "shuffled")


@dataclass
class Layer:
    """The parameters of one place."""

    name: str
    first: int
    """Number of the first of them in the model: backward comes to it last."""
    size: int = 0
    """Bytes of them."""
    kinds: Counter[Hashable] = field(default_factory=Counter)
    """What layers that need the same memory have in common."""

    @property
    def kind(self) -> Hashable:
        """All of it."""
        return frozenset(self.kinds.items())


@dataclass(frozen=True)
class _Held(Block):
    """A block of layers that stay at one turn."""

    held: frozenset[int] = frozenset()

    def active(self, switches: int, generator: torch.Generator) -> frozenset[int]:
        """The same after any number of switches."""
        return self.held


@dataclass
class Places:
    """Layers that take turns together, by their places."""

    layers: dict[int, Layer] = field(default_factory=dict)
    reached: bool = False
    """Whether backward goes through all of them at every turn, to what trains always."""

    def order(self, turn: Collection[int]) -> tuple[int, ...]:
        """Least of the worst turn of alike layers.

        Backward reaches the first of them, and whatever comes later is there sooner.
        """
        own = sorted(self.layers[place].first for place in turn)
        ends = 0 if self.reached else 1
        return (*own[:ends], *(-x for x in own[ends:]))

    def kind(self, turn: Collection[int]) -> Hashable:
        """What turns of alike layers have in common."""
        return frozenset(Counter(self.layers[place].kind for place in turn).items())


def turns_of(optimizer: Optimizer, params: Sequence[Tensor]) -> list[Turn]:
    """The turns of which one is the worst.

    Of an order that is written down they are those of a whole round. Of one that is drawn any
    layers may come together: for every layer the turn that has it beside the largest others. Of
    turns of alike layers it is the one that holds most at every moment: see :meth:`Places.order`.

    Args:
        optimizer: over what stands for the parameters.
        params: that, in the order of the model.
    """
    assert isinstance(optimizer, _Layers)
    places = _places(optimizer, params)
    own = [_sets(block, found) for block, found in places.items()]
    return [dict(zip(places, turn, strict=True)) for turn in product(*own)]


def take_turns(optimizer_class: type[Optimizer]) -> bool:
    """Whether layers do under a class of optimizers."""
    return issubclass(optimizer_class, _Layers)


def holding(make: Make, turn: Turn) -> Make:
    """What makes an optimizer whose layers stay at a turn."""

    def made(places: Mapping[int, nn.Parameter]) -> Optimizer:
        optimizer = make(places)
        assert isinstance(optimizer, _Layers)
        for items, _ in optimizer._groups():
            for item in items:
                block = item.subspace
                if isinstance(block, Block):
                    own = {f.name: getattr(block, f.name) for f in fields(block)}
                    item.subspace = _Held(**own, held=turn.get(_all(block), frozenset()))
        optimizer._take_turns()
        return optimizer

    return made


def end_turn(optimizer: Optimizer) -> None:
    """What ends the step before a turn, where layers take turns and it is time."""
    if isinstance(optimizer, _Layers):
        optimizer._take_turns()


def names_of(optimizer: Optimizer, turn: Turn, params: Sequence[Tensor]) -> tuple[str, ...]:
    """Names of the layers that train in a turn, in the order of the model."""
    assert isinstance(optimizer, _Layers)
    places = _places(optimizer, params)
    own = [places[block].layers[place] for block, chosen in turn.items() for place in chosen]
    return tuple(layer.name for layer in sorted(own, key=lambda layer: layer.first))


def worst_of(found: Sequence[Estimate]) -> Estimate:
    """The turn of the highest peak; of each moment the worst that it is in any of them."""
    return _beside_any(max(found, key=lambda e: e.peak), found)


def over_first(found: Sequence[Estimate]) -> Estimate:
    """What is held in the first, and beside it each moment as it is at its worst in any."""
    return _beside_any(found[0], found)


def _beside_any(own: Estimate, found: Sequence[Estimate]) -> Estimate:
    beside = {
        moment: max(e.held + e.beside[moment] for e in found) - own.held for moment in own.beside
    }
    return replace(own, beside=beside)


def _all(block: Block) -> Block:
    """What blocks that take turns together have in common."""
    return replace(block, position=0, rank=0)


def _places(optimizer: _Layers, params: Sequence[Tensor]) -> dict[Block, Places]:
    """The layers that take turns; several sets of them where groups disagree how."""
    number = {p: i for i, p in enumerate(params)}
    always = len(params)
    found: dict[Block, Places] = {}
    for at, group in enumerate(optimizer.param_groups):
        every = layers_of(group, optimizer.param_groups)[1] if group["rank"] is not None else []
        for item in optimizer._items(group):
            block, p = item.subspace, item.param
            if not optimizer._trains(p):
                continue
            if not isinstance(block, Block):
                always = min(always, number[p])
                continue
            layers = found.setdefault(_all(block), Places()).layers
            layer = layers.setdefault(block.position, Layer(every[block.position], number[p]))
            layer.first = min(layer.first, number[p])
            layer.size += p.numel() * p.element_size()
            layer.kinds[at, p.shape, p.stride(), p.dtype] += 1
    for places in found.values():
        places.reached = all(always < layer.first for layer in places.layers.values())
    return found


def _sets(block: Block, places: Places) -> list[frozenset[int]]:
    """Places of the layers of each turn, the worst one of those of alike layers."""
    if block.block_order in DRAWN:
        found = _drawn(block, places)
    else:
        found = [block.active(n, torch.Generator()) for n in range(block.count)]
    worst: dict[Hashable, frozenset[int]] = {}
    for turn in found:
        own = turn.intersection(places.layers)
        before = worst.get(places.kind(own))
        if before is None or places.order(own) < places.order(before):
            worst[places.kind(own)] = own
    return list(worst.values())


def _drawn(block: Block, places: Places) -> list[frozenset[int]]:
    """Of every kind of layers, those of it beside the largest others."""
    layers, weights = places.layers, block.layer_weights
    if block.block_order != "random" or weights is None:
        weights = (1.0,) * block.count
    there = sorted((x for x in layers if weights[x] > 0), key=lambda x: layers[x].first)
    largest = sorted(reversed(there), key=lambda x: -layers[x].size)
    found = []
    for one in there:  # the first of the model among them, or any other of its kind
        others = [x for x in largest if x != one][: block.size - 1]
        found.append(frozenset([one, *others][: block.size]))
    return found
