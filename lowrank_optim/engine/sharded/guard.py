"""Whether each gradient can be used: decided by all ranks together, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.engine.plan import ParamPlan, on_accelerator
from lowrank_optim.engine.tracing import fake_mode
from lowrank_optim.sharding import collectives
from lowrank_optim.tensors.projected_grad import ProjectedGrad


def agreed_norms(items: Sequence[tuple[ParamPlan, ParamPlan]]) -> dict[int, Tensor]:
    """The norm of each whole gradient, by the ``id`` of its parameter; none of those without.

    One all-reduce for all parameters of a mesh, for each of its dimensions.

    Args:
        items: parameters, and what stands for the part of each that is here.

    Raises:
        RuntimeError: some ranks have the gradient of a parameter, and others have not.
    """
    by_mesh: dict[tuple[int, ...], list[tuple[ParamPlan, ParamPlan]]] = {}
    for item, twin in items:
        assert item.part is not None
        key = tuple(id(group) for group in item.part.groups)
        by_mesh.setdefault(key, []).append((item, twin))
    return {key: norm for own in by_mesh.values() for key, norm in _of_mesh(own).items()}


def _of_mesh(items: Sequence[tuple[ParamPlan, ParamPlan]]) -> dict[int, Tensor]:
    part, device = items[0][0].part, items[0][1].param.device
    assert part is not None
    squares = torch.zeros(2, len(items), dtype=torch.float64, device=device)
    for n, (item, twin) in enumerate(items):
        if twin.param.grad is not None:
            assert item.part is not None
            # a copy counts for its share: of k copies each adds the k-th part of the square
            squares[0, n] = _square(twin.param.grad) / item.part.times
            squares[1, n] = 1
    ranks = 1
    for group in part.groups:
        collectives.sum_([squares], group)
        ranks *= group.size()
    have = [twin.param.grad is not None for _, twin in items]
    # a device would wait, and tensors without data have no answer
    if not on_accelerator(squares) and fake_mode() is None:
        for (item, _), count in zip(items, squares[1].tolist(), strict=True):
            if 0 < count < ranks:
                raise RuntimeError(
                    f"{int(count)} of {ranks} ranks have a gradient of {item.name}, and the others "
                    "have none: a step would differ from rank to rank. Let every rank use the "
                    "parameter, or fill the missing gradients with zeros"
                )
    norms = squares[0].sqrt()
    return {id(item.param): norms[n] for n, (item, _) in enumerate(items) if have[n]}


def _square(grad: Tensor) -> Tensor:
    if isinstance(grad, ProjectedGrad):  # its coordinates are finite where the gradient is
        return torch.stack([_square(x) for x in grad.coords.values()]).sum()
    if grad.numel() == 0:
        return grad.new_zeros((), dtype=torch.float64)
    norm = ops.matrix_norm(grad if grad.dim() > 1 else grad.reshape(1, -1))
    return norm.double().square().sum()
