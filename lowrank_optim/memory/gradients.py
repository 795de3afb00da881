"""Which gradients live, and in what form: whole, as coordinates, or not at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_optim.backward.projecting import coords_of, items_of, kept_dtype
from lowrank_optim.engine.schedule import phase
from lowrank_optim.memory.activations import Left
from lowrank_optim.memory.blocks import Sized, sized_on
from lowrank_optim.memory.reporting import storage_bytes
from lowrank_optim.memory.training import Training
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import local


@dataclass(frozen=True)
class Gradients:
    """Those of a model; parameters are numbered in its order."""

    sizes: dict[int, int]
    """What is taken for the gradient of each that is trained."""
    left: dict[int, Left]
    """What takes its place once it has arrived, where something does."""
    whole: frozenset[int]
    """Who keeps a whole one at the worst step though there are coordinates: a basis is due."""
    one_by_one: bool
    """Whether each arrives where others are already, to be added up."""
    sized: Sized
    """What is taken for a tensor."""

    @classmethod
    def of(cls, optimizer: Optimizer, params: Sequence[Tensor], training: Training) -> Gradients:
        """Gradients of ``params``, which stand for those of the model."""
        sized = sized_on(training.device)
        trained = ((i, p) for i, p in enumerate(params) if p.requires_grad)
        sizes = {i: sized(storage_bytes([local(p)])) for i, p in trained}
        many = training.accumulation_steps > 1
        if training.in_backward == "project" and training.first_basis == "micro":
            left, whole = _coordinates(optimizer, params, training.coords_dtype, sized)
            return cls(sizes, left, whole, many, sized)
        if training.in_backward == "step" and not many:
            return cls(sizes, {i: () for i in sizes}, frozenset(), many, sized)
        return cls(sizes, {}, frozenset(), many, sized)

    @property
    def total(self) -> int:
        """Of one whole gradient of every parameter."""
        return sum(self.sizes.values())

    @property
    def largest(self) -> int:
        """Of the largest gradient."""
        return max(self.sizes.values(), default=0)

    def kept(self, whole: Collection[int]) -> int:
        """Bytes once all have arrived, where those of ``whole`` are to stay as they are."""
        kept = {i: parts for i, parts in self.left.items() if i not in whole}
        return self.total + sum(bytes_of(x, self.sized) - self.sizes[i] for i, x in kept.items())

    @property
    def in_flight(self) -> int:
        """The largest that is on its way to where it is added up, or to its coordinates."""
        coming = self.sizes if self.one_by_one else self.left
        return max((self.sizes[i] for i in coming), default=0)

    @property
    def live(self) -> int:
        """Most that is alive at once."""
        return self.kept(self.whole) + self.in_flight

    def staying(self, i: int) -> Left | None:
        """What is left of a gradient at the worst step; None if all of it."""
        return None if i in self.whole else self.left.get(i)


def bytes_of(left: Left, sized: Sized) -> int:
    """What is taken for tensors of these shapes and dtypes."""
    return sum(sized(math.prod(shape) * dtype.itemsize) for shape, dtype in left)


def _coordinates(
    optimizer: Optimizer, params: Sequence[Tensor], coords_dtype: str, sized: Sized
) -> tuple[dict[int, Left], frozenset[int]]:
    """What becomes of gradients that become coordinates, and who stays whole at the worst step.

    Coordinates are taken on the meta device, so that their formats are those of a real run.
    """
    assert isinstance(optimizer, LowRankOptimizer)
    numbers = {p: i for i, p in enumerate(params)}
    found: dict[int, Left] = {}
    due: dict[int, dict[int, list[int]]] = {}
    sizes: dict[int, int] = {}
    for group, item in items_of(optimizer):
        if item.subspace is None or not item.alone or not item.param.requires_grad:
            continue
        param, chosen = item.param, optimizer._strategies(group)
        coords = coords_of(item, optimizer.state[param], torch.empty_like(param)).values()
        number = numbers[param]
        found[number] = tuple((tuple(x.shape), kept_dtype(x.dtype, coords_dtype)) for x in coords)
        sizes[number] = sized(param.nbytes)
        due.setdefault(chosen.gap, {}).setdefault(phase(item, chosen), []).append(number)

    def saved(own: Iterable[int]) -> int:
        return sum(sizes[i] - bytes_of(found[i], sized) for i in own)

    whole: set[int] = set()
    for phases in due.values():
        whole.update(max(phases.values(), key=saved))
    return found, frozenset(whole)
