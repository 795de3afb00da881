"""Whether each gradient can be used: decided by all ranks together, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.sharded.failures import of_all
from lowrank_optim.engine.tracing import fake_mode
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.parts import Part
from lowrank_optim.tensors.projected_grad import ProjectedGrad


class Agreed(NamedTuple):
    """What all ranks know of a parameter before it steps."""

    norm: Tensor
    """Of its whole gradient."""
    weights: Tensor | None
    """Sum of the squares of its whole weights, of each matrix apart, where that was asked for."""


class Asked(NamedTuple):
    """A parameter, as the guard looks at it."""

    item: ParamPlan
    twin: ParamPlan
    """What stands for the part that is here."""
    weights: Tensor | None = None
    """Sum of the squares of its weights that are here, if all ranks are to know that of all."""


def agreed(items: Sequence[Asked]) -> dict[int, Agreed]:
    """By the ``id`` of each parameter; none of those without a gradient.

    One all-reduce for all parameters of a mesh, for each of its dimensions.

    Args:
        items: the parameters.

    Raises:
        RuntimeError: some ranks have the gradient of a parameter, and others have not.
    """
    by_mesh: dict[tuple[int, ...], list[Asked]] = {}
    for own in items:
        key = tuple(id(group) for group in _part(own).groups)
        by_mesh.setdefault(key, []).append(own)
    return {key: found for own in by_mesh.values() for key, found in _of_mesh(own).items()}


def _part(asked: Asked) -> Part:
    assert asked.item.part is not None
    return asked.item.part


def _of_mesh(items: Sequence[Asked]) -> dict[int, Agreed]:
    part, device = _part(items[0]), items[0].twin.param.device
    # a copy counts for its share: of k copies each adds the k-th part of the square
    asked = [x.weights / _part(x).times for x in items if x.weights is not None]
    sizes = [x.numel() for x in asked]
    message = torch.zeros(2 * len(items) + sum(sizes), dtype=torch.float64, device=device)
    squares = message[: 2 * len(items)].view(2, -1)
    for n, x in enumerate(items):
        if x.twin.param.grad is not None:
            squares[0, n] = _square(x.twin.param.grad) / _part(x).times
            squares[1, n].fill_(1)  # a number that is assigned is copied, and a host waits
    weights = torch.split(message[2 * len(items) :], sizes)
    for own, squares_here in zip(weights, asked, strict=True):
        own.copy_(squares_here.reshape(-1))
    ranks = 1
    for group in part.groups:
        collectives.sum_([message], group)
        ranks *= group.size()
    have = [twin.param.grad is not None for _, twin, _ in items]
    # a device would wait, and tensors without data have no answer
    if not on_accelerator(squares) and fake_mode() is None:
        for (item, _, _), count in zip(items, squares[1].tolist(), strict=True):
            if 0 < count < ranks:
                raise of_all(
                    RuntimeError(
                        f"{int(count)} of {ranks} ranks have a gradient of {item.name}, and the "
                        "others have none: a step would differ from rank to rank. Let every rank "
                        "use the parameter, or fill the missing gradients with zeros"
                    )
                )
    norms = squares[0].sqrt()
    found, each = {}, iter(weights)
    for n, (item, _, given) in enumerate(items):
        total = None if given is None else next(each).view(given.shape)
        if have[n]:
            found[id(item.param)] = Agreed(norms[n], total)
    return found


def _square(grad: Tensor) -> Tensor:
    if isinstance(grad, ProjectedGrad):  # its coordinates are finite where the gradient is
        return torch.stack([_square(x) for x in grad.coords.values()]).sum()
    if grad.numel() == 0:
        return grad.new_zeros((), dtype=torch.float64)
    norm = ops.matrix_norm(grad if grad.dim() > 1 else grad.reshape(1, -1))
    return norm.double().square().sum()
