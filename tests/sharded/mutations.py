"""One kind of collective at a time that does not happen: what the tests must see."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tests.sharded.ranks import World

SEAM = "lowrank_optim.sharding.collectives"
"""The one module through which a step talks to other ranks."""


@dataclass(frozen=True)
class Mutation:
    """A function of the seam, and which of its calls in a step are changed."""

    function: str
    calls: Literal["all", "first", "later", "even", "odd"] = "all"
    how: Literal["skip", "one rank"] = "skip"
    """Give the argument back, or let what the first rank sends be all that arrives."""


MUTATIONS: dict[str, Mutation] = {
    "guard": Mutation("sum_", "first"),
    "scores": Mutation("sum_", "later"),
    "sum of two sides": Mutation("sum_", "later"),
    "scalars of Fira": Mutation("sum_", "later"),
    "means of Adafactor": Mutation("sum_", "later"),
    "weights of Adafactor": Mutation("sum_", "first"),
    "turn to columns": Mutation("to_columns", how="one rank"),
    "turn to rows": Mutation("to_blocks", how="one rank"),
    "edges to blocks": Mutation("to_columns", how="one rank"),
    "gather to the owner": Mutation("exchange", how="one rank"),
    "broadcast of the basis": Mutation("broadcast", how="one rank"),
    "sum of SST's u and s": Mutation("sum_", "even"),
    "length of SST's v": Mutation("sum_", "odd"),
    "weight to SST's owner": Mutation("exchange", "first", how="one rank"),
    "SST's u and s to all": Mutation("broadcast", how="one rank"),
    "SST's v to who has its columns": Mutation("exchange", "later", how="one rank"),
    "sum of one factor of SwitchLoRA": Mutation("sum_", "later"),
    "factors to the owner of a restart": Mutation("exchange", "first", how="one rank"),
    "one factor of a restart to all": Mutation("broadcast", how="one rank"),
    "the other to who has its columns": Mutation("exchange", "later", how="one rank"),
}
"""A guard is the first sum of a step, since it comes before anything is written. SST sums twice for
each of its buckets, coordinates and then lengths."""


@dataclass
class Count:
    """Calls of the function in this step, and how many were changed in all."""

    in_step: int = 0
    changed: int = 0


def chosen(calls: str, n: int) -> bool:
    """Whether the n-th call of a step, counted from 1, is changed; the first is never odd."""
    if calls in ("even", "odd"):
        return n > 1 and (n % 2 == 0) == (calls == "even")
    return calls == "all" or (calls == "first") == (n == 1)


@contextmanager
def mutated(mutation: Mutation | None, world: World, seam: ModuleType) -> Iterator[Count]:
    """The seam with one function changed, wherever it has been imported to.

    Who uses it sets ``in_step`` to 0 before every step.
    """
    count = Count()
    if mutation is None:
        yield count
        return
    original = getattr(seam, mutation.function)
    assert callable(original)

    def changed(*args: Any, **kwargs: Any) -> Any:
        count.in_step += 1
        if not chosen(mutation.calls, count.in_step):
            return original(*args, **kwargs)
        count.changed += 1
        if mutation.how == "skip":
            return args[0]
        if world.rank == 0:
            return original(*args, **kwargs)
        return original(*tree_map(silent, args), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for place in holders(original, mutation.function, seam):
            patch.setattr(place, mutation.function, changed)
        yield count


def silent(x: Any) -> Any:
    """Zeros in place of a tensor."""
    return torch.zeros_like(x) if isinstance(x, Tensor) else x


def holders(original: Callable[..., Any], name: str, seam: ModuleType) -> list[ModuleType]:
    """Modules of the package that have the function under its name."""
    ours = [m for key, m in sys.modules.items() if key.split(".")[0] == "lowrank_optim"]
    return [m for m in {seam, *ours} if m.__dict__.get(name) is original]
