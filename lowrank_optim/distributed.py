"""Several processes: placements for FSDP2 and a hook for DDP, with which little is sent."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lowrank_optim.backward.comm_hook import ddp_comm_hook
from lowrank_optim.groups.values import check
from lowrank_optim.subspaces.base import view_for

__all__ = ["ddp_comm_hook", "shard_placement_fn"]

Placement = Callable[[Tensor], Shard | None]


def shard_placement_fn(
    world_size: int, *, proj_type: str = "std", projector: str = "rsvd", flatten: bool = False
) -> Placement:
    """The ``shard_placement_fn`` of ``fully_shard`` that never splits a projected dimension.

    ``fully_shard`` splits rows, dimension 0, unless it is told otherwise. A matrix ``(rows, cols)``
    with fewer rows than columns is projected on its rows, and a step must then bring its columns
    together and take the update back. With dimension 1 split instead, no step sends anything but
    one number a parameter: whether its gradient is finite (Fira: two more).

    Args:
        world_size: ranks among which ``fully_shard`` splits a parameter: of a mesh of two
            dimensions, the size of the second. ``fully_shard`` splits dimension 1 only where they
            divide it, or what tensor parallel left of it; other parameters keep dimension 0.
        proj_type: of the optimizer (default: "std").
        projector: of the optimizer (default: "rsvd"; "columns" and "rows" say which side is split).
        flatten: of the group, for 3-d parameters (default: False).

    Returns:
        A function of a parameter, which returns ``Shard(dim)``, or None for dimension 0.

    Raises:
        ValueError: an argument is not known.

    Example:
        >>> import torch
        >>> from lowrank_optim.distributed import shard_placement_fn
        >>> place = shard_placement_fn(8)
        >>> place(torch.nn.Parameter(torch.empty(4096, 11008)))
        Shard(dim=1)
        >>> print(place(torch.nn.Parameter(torch.empty(11008, 4096))))
        None
    """
    if not (isinstance(world_size, int) and world_size >= 1):
        raise ValueError(f"world_size must be a number of ranks, 1 or more, got {world_size!r}")
    group = {"proj_type": proj_type, "projector": projector, "flatten": flatten}
    check({**group, "rank": 0.5})  # any that goes with all projectors

    def place(param: Tensor) -> Shard | None:
        view = view_for(group, param.shape)
        if view is None or view.flip or not param.numel():  # of nothing it takes dimension 0 alone
            return None
        first = len(view.batch)
        if param.shape[first + 1] % (world_size * _pieces(param, first + 1)):
            return None
        return Shard(first + 1)

    return place


def _pieces(param: Tensor, dim: int) -> int:
    """In how many pieces tensor parallel has split a dimension."""
    if not isinstance(param, DTensor):
        return 1
    own = zip(param.device_mesh.shape, param.placements, strict=True)
    return math.prod(size for size, place in own if place.is_shard(dim))
