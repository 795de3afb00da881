"""A communication hook for DistributedDataParallel that sends coordinates of matrices alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim.backward.projecting import (
    Plans,
    check_projecting,
    coords_of,
    first_state,
    items_of,
    kept_dtype,
)
from lowrank_optim.backward.wrapped import unwrapped
from lowrank_optim.engine import tracing
from lowrank_optim.engine.plan import ParamPlan, State
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.sharded.replicas import lets_leave, wrappers
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding import collectives
from lowrank_optim.subspaces.target import Target
from lowrank_optim.tensors.matrix import shares_memory
from lowrank_optim.tensors.projected_grad import Coords

Hook = Callable[[Any, Any], Any]
WHO = "ddp_comm_hook"
INSTEAD = "train without the hook, under DistributedDataParallel alone"


def ddp_comm_hook(optimizer: LowRankOptimizer) -> Hook:
    r"""What ``DistributedDataParallel.register_comm_hook`` takes: it sends coordinates.

    .. math:: R = \frac{1}{k} \sum_i P^T G_i, \qquad G \leftarrow P R

    Of a matrix whose basis is not due in the coming step the ranks average R, and its gradient is
    P R from then on, of which the step finds R again. What has no subspace, and matrices whose
    basis is due, are averaged whole. The step is that of plain DDP, but for rounding: in bfloat16
    P is orthonormal to three digits. Clipping sees the norm of what the subspace sees.

    It saves what is sent, r rows of m, and costs two products a matrix; no memory is saved, as
    the wrapper keeps whole gradients. :func:`~lowrank_optim.attach_in_backward` with a
    ``process_group``, in place of the wrapper, saves both.

    Args:
        optimizer: any optimizer of this package that drops what its subspace does not see, and
            whose coordinates are those of an orthonormal basis; also as accelerate or Lightning
            wrapped it. Made for the parameters of the model.

    Returns:
        A hook, to be registered with ``state=None``, or with the process group of the model.

    Raises:
        TypeError: the optimizer is not one of this package.
        ValueError: a step needs more of a gradient than its coordinates, or they are those of
            factors.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from lowrank_optim import GaLoreAdamW
        >>> from lowrank_optim.distributed import ddp_comm_hook
        >>> store = dist.HashStore()  # torchrun makes it, and the world is larger
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 32))
        >>> optimizer = GaLoreAdamW(model.module.named_parameters(), lr=1e-2, rank=4)
        >>> model.register_comm_hook(None, ddp_comm_hook(optimizer))
        >>> for x in torch.randn(2, 8, 64):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> dist.destroy_process_group()
    """
    sender = _Sender(unwrapped(optimizer, WHO))

    def ddp_comm_hook(state, bucket):  # type: ignore[no-untyped-def]  # torch looks at annotations
        return sender.send(state, bucket)

    return ddp_comm_hook


def check_lifted(optimizer: LowRankOptimizer) -> None:
    """Raise unless gradients can be replaced by what their coordinates say.

    Raises:
        ValueError: naming the parameter.
    """
    check_projecting(optimizer, WHO, "does not send", INSTEAD)
    for _, plan in items_of(optimizer):
        if plan.subspace is None or plan.view is None or not plan.alone:
            continue
        if set(plan.subspace.coord_shapes(plan.view)) != {"low"}:
            raise ValueError(
                f"the coordinates of {plan.name} are those of factors of the weight, which are no "
                f"orthonormal basis, and {WHO} would have to make a gradient of them: use "
                "attach_in_backward(optimizer, 'project', process_group=...) in place of "
                "DistributedDataParallel"
            )


class _Sender:
    """Averages one bucket of gradients after the other."""

    def __init__(self, optimizer: LowRankOptimizer) -> None:
        check_lifted(optimizer)
        self._optimizer, self._plans = optimizer, Plans(optimizer)
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None

    @torch.no_grad()
    def send(self, state: Any, bucket: Any) -> Any:
        group = self._group_of(state, bucket)
        whole: Tensor = bucket.buffer()
        grads: list[Tensor] = bucket.gradients()
        params: list[Tensor] = bucket.parameters()
        bases = [self._basis(param) for param in params]
        if not any(bases):
            return collectives.average_(whole, group).get_future().then(lambda f: f.value()[0])
        with tracing.hosted():
            parts = [
                grad if basis is None else _coordinates(*basis, grad)
                for grad, basis in zip(grads, bases, strict=True)
            ]
        messages: dict[torch.dtype, list[Tensor]] = {}
        for x in parts:
            messages.setdefault(x.dtype, []).append(x)
        flat = {k: torch.cat([x.reshape(-1) for x in own]) for k, own in messages.items()}
        *others, last = [collectives.average_(x, group) for x in flat.values()]
        for work in others:  # coordinates of float16 come in float32
            work.wait()

        @torch.no_grad()
        def arrived(_: Any) -> Tensor:
            rest = {
                k: iter(torch.split(x, [p.numel() for p in messages[k]])) for k, x in flat.items()
            }
            for part, grad, basis in zip(parts, grads, bases, strict=True):
                mean = next(rest[part.dtype]).view(part.shape)
                if basis is None:
                    grad.copy_(mean)
                else:
                    with tracing.hosted():
                        lift_(*basis, {"low": mean}, grad)
            return whole

        return last.get_future().then(arrived)

    def _basis(self, param: Tensor) -> tuple[ParamPlan, State] | None:
        """What the coming step projects by; None where it needs the whole gradient."""
        found = self._plans.find(param)
        if found is None:
            return None
        group, plan = found
        if plan.subspace is None or not plan.alone:
            return None
        state = self._optimizer.state.get(param) or first_state()
        if basis_due(plan, state, self._optimizer._strategies(group)):
            return None
        return plan, state

    def _group_of(self, state: Any, bucket: Any) -> dist.ProcessGroup:
        """The ranks that the model is on.

        Raises:
            ValueError: ``state`` is something else.
            RuntimeError: a rank may leave the others, and would no longer know what is sent.
        """
        if self._wrapper is None:
            found = next(iter(wrappers(bucket.parameters()).values()), None)
            self._wrapper = None if found is None else weakref.ref(found)
        wrapper = None if self._wrapper is None else self._wrapper()
        if wrapper is None or (state is not None and state is not wrapper.process_group):
            raise ValueError(
                "the state of ddp_comm_hook must be None, or the process group of the "
                f"DistributedDataParallel that it is registered with, got {state!r}"
            )
        if lets_leave(wrapper):
            raise RuntimeError(
                f"{WHO} sends what the step of the optimizer needs, and a rank that has left "
                "join() of DistributedDataParallel takes no steps: give all ranks as many batches "
                "and leave join() out, or pass it throw_on_early_termination=True"
            )
        group: dist.ProcessGroup = wrapper.process_group
        return group


def _coordinates(plan: ParamPlan, state: State, grad: Tensor) -> Tensor:
    (low,) = coords_of(plan, state, grad).values()
    return low.to(kept_dtype(low.dtype, "auto"))


def lift_(plan: ParamPlan, state: State, coords: Coords, grad: Tensor) -> None:
    """``G <- P R``, by what adds such a thing to weights."""
    assert plan.view is not None and plan.subspace is not None
    grad.zero_()
    matrix = plan.view.of(grad)
    into = Target(matrix, matrix, coords["low"], lr=-1.0)
    replace(plan.subspace, scale=1.0).push_(into, state, coords, None)
    if not shares_memory(matrix, grad):
        stored = matrix.mT if plan.view.flip else matrix
        grad.copy_(stored.reshape(plan.view.shape))
