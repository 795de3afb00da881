"""Parameters that are stepped together, and the interface of what steps them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.undo import Undo

logger = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """Parameters of a group that share view, subspace, dtype and device; all others come alone."""

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
