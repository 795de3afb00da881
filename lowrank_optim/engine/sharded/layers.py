"""Layers of factors that lie on several ranks: gathered, stepped alike by all, and cut again.

Factors are r (m + n) numbers, small beside the weight, so that every rank has the whole of them
during a step. What a step adds to a frozen weight it adds to the part that is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.sharding.grid import chunk, length
from lowrank_optim.sharding.parts import is_sharded, local


def interval(x: Tensor) -> tuple[int, int, int] | None:
    """The dimension of a DTensor that is split, and where its part begins and ends; or None."""
    if not is_sharded(x):
        return None
    own: Any = x
    (place,) = own.placements
    if not place.is_shard():
        return None
    mesh, dim = own.device_mesh, place.dim % x.dim()
    return dim, *chunk(x.shape[dim], mesh.size(), mesh.get_local_rank())


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the whole of DTensors of one mesh: one all-gather for all that are split."""
    first: Any = tensors[0]
    mesh = first.device_mesh
    split = [(x, where[0]) for x in tensors if (where := interval(x)) is not None]
    forms = []
    for rank in range(mesh.size()):
        own = []
        for x, dim in split:
            shape = list(x.shape)
            shape[dim] = length(chunk(x.shape[dim], mesh.size(), rank))
            own.append(Form(tuple(shape), x.dtype))
        forms.append(own)
    parts = [local(x) for x, _ in split]
    device = local(first).device
    pieces = collectives.gather(parts, forms, mesh.get_group(), device) if split else []
    wholes = iter(torch.cat([own[i] for own in pieces], dim) for i, (_, dim) in enumerate(split))
    return [local(x).clone() if interval(x) is None else next(wholes) for x in tensors]


def keep_(x: Tensor, whole: Tensor) -> None:
    """Write the part of a DTensor that is here."""
    where = interval(x)
    local(x).copy_(
        whole if where is None else whole.narrow(where[0], where[1], where[2] - where[1])
    )


def placed_as(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient where its parameter is."""
    own, ours = (tuple(x.placements) for x in (grad, param))  # type: ignore[attr-defined]
    return grad if own == ours else grad.redistribute(placements=ours)  # type: ignore[attr-defined]


def by_first_rank(like: Tensor) -> Callable[[Callable[[], None], Sequence[Tensor]], None]:
    """What runs a function on one rank and gives all ranks the tensors that it wrote.

    A factorisation on two ranks differs in its last bits where their hardware differs.

    Args:
        like: a DTensor of the ranks' mesh.
    """
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    group = mesh.get_group()

    def agree(work: Callable[[], None], tensors: Sequence[Tensor]) -> None:
        sent, said = None, ""
        if mesh.get_local_rank() == 0:
            try:
                work()
            except LinAlgError as error:
                said = str(error)
            sent = [torch.tensor([not said], dtype=torch.uint8), *tensors]
        forms = [Form((1,), torch.uint8), *map(form, tensors)]
        fine, *found = collectives.broadcast(sent, forms, 0, group, tensors[0].device)
        if not bool(fine.item()):
            raise LinAlgError(said or "the first rank could not factor it")
        for x, new in zip(tensors, found, strict=True):
            x.copy_(new)

    return agree
