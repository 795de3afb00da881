"""Layers of factors that lie on several ranks: gathered, stepped alike by all, and cut again.

Factors in use are r (m + n) numbers, small beside the weight, so that every rank has the whole of
them during a step. What a step adds to a frozen weight it adds to the part that is here. All
factors of a layer come together on one rank alone, which finds new ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.engine.sharded.inputs import Input
from lowrank_optim.engine.sharded.local import as_dtensor
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.grid import Interval
from lowrank_optim.sharding.groups import coordinate, coordinates_over, group_over
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.sharding.regions import region


def spans(x: Tensor) -> tuple[Interval, ...]:
    """Where what is here of a DTensor begins and ends in each dimension."""
    own: Any = x
    return region(own.shape, own.device_mesh, own.placements)


def splits(x: Tensor) -> list[int]:
    """Dimensions of its mesh that split a DTensor."""
    own: Any = x
    places, mesh = own.placements, own.device_mesh
    return [i for i, place in enumerate(places) if hasattr(place, "dim") and mesh.size(i) > 1]


def everyone(x: Tensor) -> tuple[int, ...]:
    """Dimensions of a DTensor's mesh over which there are other ranks, or the first."""
    mesh: Any = x.device_mesh  # type: ignore[attr-defined]
    return tuple(i for i in range(mesh.ndim) if mesh.size(i) > 1) or (0,)


def with_copies(members: Sequence[Tensor]) -> list[Tensor]:
    """All of a layer's parameters alike: plain ones beside DTensors are what every rank has.

    ``fully_shard`` of a torch that takes no parameters of whole numbers leaves them so, if they are
    among its ``ignored_params``.
    """
    first: Any = next((x for x in members if is_sharded(x)), None)
    if first is None or all(map(is_sharded, members)):
        return list(members)
    from torch.distributed.tensor import Replicate  # slow; who has a DTensor has it

    mesh, places = first.device_mesh, (Replicate(),) * first.device_mesh.ndim
    return [x if is_sharded(x) else as_dtensor(x.detach(), mesh, places, x.shape) for x in members]


At = tuple[int, ...]
"""Coordinates of a rank in a mesh."""


def pieces(x: Tensor, dims: Sequence[int], order: tuple[At, ...]) -> Input:
    """What each rank over some dimensions of the mesh has of a DTensor; of copies the first has.

    Args:
        x: the DTensor.
        dims: of its mesh.
        order: the ranks, as they are in their group.
    """
    own: Any = x
    mesh, places, shape = own.device_mesh, own.placements, tuple(own.shape)
    others = tuple(i for i in dims if i not in splits(x))
    found = _places(shape, mesh, places, order, others)
    part, at = local(x), coordinate(mesh)
    if any(at[i] for i in others):
        part = part[(slice(0, 0),) * x.dim()]
    return Input(part, shape, found)


def places_of(x: Tensor, order: tuple[At, ...]) -> list[tuple[slice, ...]]:
    """Where what each rank has of a DTensor lies in it, copies too."""
    own: Any = x
    return _places(tuple(own.shape), own.device_mesh, own.placements, order, ())


@functools.lru_cache(maxsize=4096)
def _places(
    shape: tuple[int, ...],
    mesh: Any,
    placements: tuple[Any, ...],
    order: tuple[At, ...],
    others: tuple[int, ...],
) -> list[tuple[slice, ...]]:
    """Where the pieces lie; of ranks that are not the first in ``others`` nothing is taken."""
    found = []
    for at in order:
        here = region(shape, mesh, placements, at)
        here = ((0, 0),) * len(shape) if any(at[i] for i in others) else here
        found.append(tuple(slice(*span) for span in here))
    return found


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the whole of DTensors of one mesh: one all-gather for all that are split."""
    split = {n: own for n, x in enumerate(tensors) if (own := splits(x))}
    if not split:
        return [local(x).clone() for x in tensors]
    first: Any = tensors[0]
    dims = sorted({i for own in split.values() for i in own})
    group = group_over(first.device_mesh, dims)
    order = coordinates_over(first.device_mesh, dims)
    inputs = {n: pieces(tensors[n], dims, order) for n in split}
    forms = [[x.form(rank) for x in inputs.values()] for rank in range(group.size())]
    here = [x.here for x in inputs.values()]
    arrived = collectives.gather(here, forms, group, local(first).device)
    wholes = {n: x.together([own[i] for own in arrived]) for i, (n, x) in enumerate(inputs.items())}
    return [wholes[n] if n in wholes else local(x).clone() for n, x in enumerate(tensors)]


def gathered_layers(
    factors: Sequence[Sequence[Tensor]], grads: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Factors and then gradients of each layer, as :func:`gathered`.

    If a gradient is not finite on one rank it is so on all, copies included: all skip the layer.

    Args:
        factors: DTensors of each layer, all of one mesh.
        grads: of each layer, where their factors lie.
    """
    flat = gathered([x for own in zip(factors, grads, strict=True) for xs in own for x in xs])
    counts = [len(own) + len(gs) for own, gs in zip(factors, grads, strict=True)]
    starts = [0, *accumulate(counts)]
    found = [flat[i : i + n] for i, n in zip(starts, counts, strict=False)]
    first, every = grads[0][0], everyone(grads[0][0])
    if all(splits(x) == list(every) for own in grads for x in own):
        return found  # of each entry there is one
    wide = torch.float64
    norms = [[torch.linalg.vector_norm(local(x), dtype=wide) for x in own] for own in grads]
    flags = torch.stack([torch.stack(own).sum() for own in norms]).mul_(0)  # 0, or NaN
    collectives.sum_([flags], group_over(first.device_mesh, every))  # type: ignore[attr-defined]
    for own, flag in zip(found, flags.unbind(), strict=True):
        for x in own[len(own) - len(grads[0]) :]:
            x.add_(flag)
    return found


def keep_(x: Tensor, whole: Tensor) -> None:
    """Write the part of a DTensor that is here."""
    local(x).copy_(whole[tuple(slice(*span) for span in spans(x))])


def placed_as(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient where its parameter is."""
    own, ours = (tuple(x.placements) for x in (grad, param))  # type: ignore[attr-defined]
    return grad if own == ours else grad.redistribute(placements=ours)  # type: ignore[attr-defined]
