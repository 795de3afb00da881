"""Plain parameters that several ranks train alike: they share the bases that one of them finds."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import basis_due
from lowrank_optim.engine.sharded.refresh import Due, refresh_replicas
from lowrank_optim.engine.undo import Undo
from lowrank_optim.sharding.parts import replica
from lowrank_optim.subspaces.block import Block
from lowrank_optim.tensors.projected_grad import ProjectedGrad


def wrapping(params: Iterable[Tensor]) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that averages gradients of any of these, if one does.

    It leaves no trace on a parameter, so all objects are asked; milliseconds, where ranks exist.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wanted = {id(p) for p in params}
    for x in gc.get_objects():
        # not isinstance, which a proxy may answer by importing what it stands for
        if issubclass(type(x), DistributedDataParallel):
            ignored = getattr(x, "parameters_to_ignore", ())
            if any(id(p) in wanted for n, p in x.module.named_parameters() if n not in ignored):
                found: DistributedDataParallel = x
                return found
    return None


def group_of_replicas(params: Sequence[Tensor], uids: Sequence[int]) -> dist.ProcessGroup | None:
    """The ranks that step the same parameters with the same gradients; None if there are no others.

    Ranks of ``ZeroRedundancyOptimizer`` have a part of them each: they share none.

    Args:
        params: of the optimizer.
        uids: of each, what its draws depend on.
    """
    wrapper = wrapping(params)
    if wrapper is None or wrapper.process_group.size() == 1:
        return None
    mine = [(uid, tuple(p.shape)) for uid, p in zip(uids, params, strict=True)]
    digest = hashlib.sha256(repr(mine).encode()).hexdigest()
    group: dist.ProcessGroup = wrapper.process_group
    digests: list[str | None] = [None] * group.size()
    dist.all_gather_object(digests, digest, group=group)
    return group if len(set(digests)) == 1 else None


def refresh_layers(
    layers: Sequence[tuple[ParamPlan, State]], chosen: Strategies, group: dist.ProcessGroup
) -> None:
    """Refresh layers of factors, of which every rank has all."""
    for item, _ in layers:
        item.part = item.part or replica(item.view, group, item.param.shape)
    refresh_replicas([Due(item, item, state, None, chosen) for item, state in layers])


def refresh_alike(
    work: Sequence[tuple[ParamPlan, State, Strategies]], group: dist.ProcessGroup, undo: Undo
) -> None:
    """Refresh what is due of replicas before they step: a step then finds nothing due."""
    due = []
    for item, state, chosen in work:
        subspace, step = item.subspace, int(state.get("step", 0))
        if subspace is None or isinstance(subspace, Block) or not item.alone:
            continue
        if isinstance(item.param.grad, ProjectedGrad) or not basis_due(item, state, chosen):
            continue
        if subspace.reproducible(step):
            continue
        item.part = item.part or replica(item.view, group, item.param.shape)
        undo.begin(state)
        undo.keep(state, subspace.refreshed(state))
        due.append(Due(item, item, state, None, chosen))
    steps = [d.step for d in due]
    refresh_replicas(due)
    for d, step in zip(due, steps, strict=True):
        d.item.tried = step
