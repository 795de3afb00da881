"""Parameters that are stepped together: which, how many, and the interface of what steps them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.undo import SMALL, Undo
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.subspaces.block import Block

logger = logging.getLogger(__name__)

_Plan = TypeVar("_Plan", bound=ParamPlan)

CHUNK_BYTES = {False: 1 << 22, True: 1 << 28}
"""Low-rank gradients alive at once: within a CPU's cache, or enough to fill an accelerator."""


class Bucket(NamedTuple):
    """Parameters of a group that share view, subspace, dtype and device; all others come alone.

    But for small ones without a subspace on an accelerator, such as weights of norms, which come
    with others of their shape.
    """

    items: Sequence[ParamPlan]
    states: Sequence[State]
    chosen: Strategies
    """What their group chose."""
    lr: float | Tensor
    weight_decay: float
    undo: Undo
    """What is told of everything that is about to be overwritten."""


class BucketStep(Protocol):
    """One way to step a bucket whole. The engine asks each once, in order, and takes the first."""

    def can_step(self, bucket: Bucket) -> bool:
        """Whether it steps all of the bucket, with the numbers of the phases."""
        ...

    def step_(self, bucket: Bucket) -> None:
        """Step it."""
        ...


def warn_skipped(item: ParamPlan) -> None:
    """Log that a gradient could not be used."""
    logger.warning("the gradient of %s is not finite: its step is skipped", item.name)


def bucketed(
    items: Sequence[_Plan],
    chosen: Strategies,
    key: Callable[[_Plan], Any] = attrgetter("key"),
) -> list[Sequence[_Plan]]:
    """Which parameters of a group are stepped together, in what order.

    Args:
        items: parameters of a group.
        chosen: what their group chose.
        key: equal of matrices that can be stepped together (default: that of their plan).
    """
    found: list[Sequence[_Plan]] = []
    alike: dict[Any, list[_Plan]] = {}
    small: dict[Any, list[_Plan]] = {}
    for item in items:
        if item.subspace is not None and not isinstance(item.subspace, Block):
            alike.setdefault(key(item), []).append(item)
        elif item.subspace is None and on_accelerator(item.param) and item.param.numel() <= SMALL:
            small.setdefault((key(item), item.param.shape), []).append(item)
        else:
            found.append([item])
    for own in small.values():
        size = max(1, (CHUNK_BYTES[True] // 4) // max(1, own[0].param.numel()))
        found += [own[i : i + size] for i in range(0, len(own), size)]
    for own in alike.values():
        size = chunk_size(own[0], chosen)
        found += [own[i : i + size] for i in range(0, len(own), size)]
    return found


def chunk_size(item: ParamPlan, chosen: Strategies, most: int | None = None) -> int:
    """How many alike matrices to step at once, or so many that they have ``most`` bytes."""
    assert item.subspace is not None and item.view is not None
    shapes = item.subspace.coord_shapes(item.view).values()
    size = 4 * sum(math.prod(shape) for shape in shapes)
    if chosen.residual.wants == "memory":
        size += 4 * item.param.numel()
    most = CHUNK_BYTES[on_accelerator(item.param)] if most is None else most
    return max(1, most // max(1, size))
