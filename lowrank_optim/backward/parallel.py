"""Who else writes gradients: data parallelism that adds them up after backward's hooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from lowrank_optim.engine.sharded.replicas import wrappers
from lowrank_optim.groups import Group
from lowrank_optim.groups.notices import param_name
from lowrank_optim.sharding.parts import is_sharded

MESSAGE = (
    "attach_in_backward cannot work with DistributedDataParallel, which averages gradients over "
    "the ranks only after the hooks that project or step them, and keeps all of them: train the "
    "module itself with attach_in_backward(..., process_group=dist.group.WORLD), which averages "
    "them; or keep the wrapper without attach_in_backward, and let it send coordinates by "
    "model.register_comm_hook(None, lowrank_optim.distributed.ddp_comm_hook(optimizer))"
)


def in_ddp(params: Iterable[Tensor]) -> bool:
    """Whether any of these is a parameter that ``DistributedDataParallel`` averages."""
    return bool(wrappers(params))


def late_ranks() -> bool:
    """Whether there are several processes by now."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_process_group(x: object) -> bool:
    """Whether gradients can be averaged over it; not where this process is no member."""
    return dist.is_available() and isinstance(x, dist.ProcessGroup)


def check_plain(groups: Iterable[Group]) -> None:
    """Raise if a parameter has become a DTensor since ranks began to average its gradients.

    Raises:
        NotImplementedError: with its name.
    """
    for group in groups:
        for i, param in enumerate(group["params"]):
            if is_sharded(param):
                raise NotImplementedError(
                    f"attach_in_backward(process_group=...) does not support {param_name(group, i)}"
                    ", a DTensor: who shards it has averaged its gradients. Leave process_group out"
                )


def check_hooked(groups: Sequence[Group], hooked: Iterable[Tensor]) -> None:
    """Raise if ``fully_shard`` has put other tensors in the place of those that have hooks.

    Raises:
        RuntimeError: with the name of one.
    """
    there = {param for group in groups for param in group["params"]}
    if all(param in there for param in hooked):
        return
    for group in groups:
        for i, param in enumerate(group["params"]):
            if is_sharded(param) and param.requires_grad and param not in set(hooked):
                raise RuntimeError(
                    f"{param_name(group, i)} was no DTensor when attach_in_backward was called: "
                    "its gradient stays whole. Call it after fully_shard, accelerator.prepare and "
                    "the like"
                )
