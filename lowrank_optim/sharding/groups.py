"""The ranks of some dimensions of a mesh, and their process group."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from lowrank_optim.sharding.grid import coordinates

_made: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
"""Groups that no mesh has, by their ranks; they go with the default group."""


def coordinate(mesh: Any) -> list[int]:
    """Of this rank; a mesh that torch has kept from another process group remembers another's."""
    with _disable_current_modes():  # a fake tensor has no numbers
        found: list[int] = (mesh.mesh == mesh.get_rank()).nonzero()[0].tolist()
    return found


def ranks_over(mesh: Any, dims: Sequence[int]) -> list[int]:
    """Those that differ from this one in ``dims`` alone, in the order of the mesh."""
    at = coordinate(mesh)
    index = tuple(slice(None) if i in dims else at[i] for i in range(mesh.ndim))
    with _disable_current_modes():
        found: list[int] = mesh.mesh[index].reshape(-1).tolist()
    return found


def members(mesh: Any, dims: Sequence[int]) -> list[int]:
    """The same ranks in the order of :func:`group_over`, which need not be that of the mesh."""
    if len(dims) == 1:
        return dist.get_process_group_ranks(mesh.get_group(dims[0]))
    return sorted(ranks_over(mesh, dims))


def coordinates_over(mesh: Any, dims: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Coordinates in the mesh of the ranks of :func:`group_over`, in its order."""
    with _disable_current_modes():
        ranks: list[int] = mesh.mesh.reshape(-1).tolist()
    at = dict(zip(ranks, coordinates(tuple(mesh.mesh.shape)), strict=True))
    return tuple(at[rank] for rank in members(mesh, dims))


def group_over(mesh: Any, dims: Sequence[int]) -> dist.ProcessGroup:
    """The process group of :func:`ranks_over`.

    One dimension has its own. Of several it is made when a step first needs it, by its members
    alone and alike: other ranks, as those of another pipeline stage, need not know of it.
    """
    if len(dims) == 1:
        own: dist.ProcessGroup = mesh.get_group(dims[0])
        return own
    world, ranks = dist.group.WORLD, tuple(members(mesh, dims))
    assert world is not None
    if ranks == tuple(dist.get_process_group_ranks(world)):
        return world
    made = _made.setdefault(world, {})
    if ranks not in made:
        made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return made[ranks]


def check_order(mesh: Any, dims: Sequence[int], name: str) -> None:
    """Raise where nobody can tell which part of a parameter a rank has.

    FSDP2, ``distribute_tensor`` and ``full_tensor`` count the ranks of a dimension as its process
    group does, in ascending order; coordinates and checkpoints of torch, as the mesh does.

    Args:
        mesh: where the parameter lies.
        dims: dimensions of the mesh that split it.
        name: for the error.

    Raises:
        NotImplementedError: the two differ.
    """
    for dim in dims:
        over = ranks_over(mesh, [dim])
        if over != members(mesh, [dim]):
            raise NotImplementedError(
                f"{name} is split over ranks {over} of a DeviceMesh, of which torch takes the "
                f"parts as of {members(mesh, [dim])} when it gathers them, and as of the mesh when "
                "it saves them: make the mesh of ranks that ascend along each dimension"
            )


def check_backend(group: dist.ProcessGroup, device: torch.device, name: str) -> None:
    """Raise where a group has no backend for the device of a parameter: its collectives would.

    Raises:
        RuntimeError: with the backends that it has.
    """
    known = [
        pair.split(":")[0] for pair in dist.get_backend_config(group).split(",") if ":" in pair
    ]
    if device.type == "meta" or not known or device.type in known:
        return
    raise RuntimeError(
        f"{name} lies on {device.type!r}, as under CPUOffloadPolicy, and its process group has "
        f"{dist.get_backend_config(group)!r}, no backend for that: call "
        'init_process_group("cpu:gloo,cuda:nccl"), or leave the offloading out'
    )
