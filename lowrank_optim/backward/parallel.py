"""Who else writes gradients: data parallelism that averages them after backward's hooks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lowrank_optim.engine.sharded.replicas import averaged

MESSAGE = (
    "attach_in_backward cannot work with DistributedDataParallel, which averages gradients over "
    "the ranks only after the hooks that project or step them, and keeps all of them: train the "
    "module itself, and average in hooks of your own (see attach_in_backward)"
)


def in_ddp(params: Iterable[Tensor]) -> bool:
    """Whether any of these is a parameter that ``DistributedDataParallel`` averages."""
    return bool(averaged(params))
