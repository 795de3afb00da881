"""Gradients of parameters that lie on several ranks, as FSDP2 hands them over inside backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.backward.projecting import items_of
from lowrank_optim.engine.plan import ParamPlan
from lowrank_optim.engine.sharded.local import as_dtensor, summed_coords
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.parts import is_sharded, local
from lowrank_optim.subspaces.block import Block

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "process_group": (
        lambda x: x is not None,
        "who shards it has averaged its gradients, copies of shards (HSDP) included. Leave "
        "process_group out; plain parameters beside it that nobody averages can be sharded too, or "
        "have an optimizer of their own with the process_group",
    ),
    "first_basis": (
        lambda x: x == "micro",
        "ranks find a basis together, in step(). Pass first_basis='boundary', or leave it out",
    ),
}
"""Arguments of ``attach_in_backward`` that DTensors do not go with: which values, and why."""

OF_LAYERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    name: (
        asks,
        "gradients of a layer of factors wait for step(), and their norms are not taken. Call "
        "torch.nn.utils.clip_grad_norm_ before step(), and leave this out",
    )
    for name, asks in (("max_norm", lambda x: x is not None), ("keep_norms", bool))
}
"""Those that layers of factors do not go with, where they are DTensors."""


def check_shards(optimizer: LowRankOptimizer, given: Mapping[str, Any]) -> None:
    """Raise if an argument does not go with a DTensor among the parameters.

    Raises:
        ValueError: naming both.
        NotImplementedError: a DTensor is kept on another device than that of its mesh.
    """
    sharded = [plan for _, plan in items_of(optimizer) if is_sharded(plan.param)]
    factors = [plan for plan in sharded if not plan.alone]
    for plans, table in ((sharded, REFUSED), (factors, OF_LAYERS)):
        for plan, (name, (refused, why)) in itertools.product(plans[:1], table.items()):
            if refused(given[name]):
                raise ValueError(
                    f"attach_in_backward({name}={given[name]!r}) does not go with {plan.name}, a "
                    f"DTensor: {why}"
                )
    for plan in sharded:
        own, mesh = local(plan.param).device.type, plan.param.device_mesh  # type: ignore[attr-defined]
        if own not in (mesh.device_type, "meta"):
            raise NotImplementedError(
                f"attach_in_backward does not support {plan.name}, a DTensor on {own} of a mesh of "
                f"{mesh.device_type}: its gradient may still be on its way when backward "
                "hands it over. Use one of CPUOffloadPolicy and attach_in_backward"
            )


def stays_whole(plan: ParamPlan) -> bool:
    """Whether a matrix has no coordinates of what is here alone: they would need a message.

    Its columns are on other ranks, or its coordinates are a sum over all columns, and the norm of
    a part of that sum is no part of the norm.
    """
    part, view, subspace = plan.part, plan.view, plan.subspace
    if part is None or not plan.sharded or view is None or subspace is None:
        return False
    if isinstance(subspace, Block) or not part.summed:
        return False
    return part.side == "blocks" or (part.ranks > 1 and bool(summed_coords(subspace, view)))


def shard_of(plan: ParamPlan) -> Tensor | None:
    """The gradient that is here, of a DTensor; None if it does not lie as its parameter does."""
    grad: Any = plan.param.grad
    if not is_sharded(grad) or plan.part is None or tuple(grad.placements) != plan.part.placements:
        return None
    return local(grad)


def keep_shard(param: Tensor, x: Tensor) -> None:
    """Let ``x`` be what is here of the gradient of a DTensor: FSDP2 adds the next one to it."""
    grad: Any = param.grad
    grad._local_tensor = x


def like_shard(param: Tensor, x: Tensor) -> Tensor:
    """A DTensor that lies as a parameter does, of which ``x`` is here."""
    whole: Any = param
    return as_dtensor(x, whole.device_mesh, tuple(whole.placements), param.shape)


def alone(x: Tensor) -> Tensor:
    """``x`` in memory of its own: FSDP2 hands over views of one tensor of all of a module."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


class Together:
    """Parameters whose gradients one message brought, so that they are stepped with one too.

    FSDP2 reduces the gradients of all parameters of one ``fully_shard`` in one tensor, and hands
    over its pieces one by one. The last of them is known from the second backward on. In the first
    it is seen when another tensor's piece comes, or at the end of the backward: the same on all
    ranks, as these are the same tensors in the same order.

    Args:
        step: called with parameters, in the order in which their gradients arrived.
    """

    def __init__(self, step: Callable[[list[Tensor]], None]) -> None:
        self._step = step
        self._waiting: list[Tensor] = []
        self._last: set[Tensor] = set()
        """Parameters that were the last of a message."""
        self._queued = False

    def arrived(self, param: Tensor) -> None:
        """The gradient of a parameter is to be applied."""
        if self._waiting and _memory(param) != _memory(self._waiting[-1]):
            self._end()
        self._waiting.append(param)
        if param in self._last:
            self.take()
        elif not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def take(self) -> None:
        """Step those that wait."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._step(waiting)

    def forget(self) -> None:
        """Nothing waits: a backward that raised leaves no end of itself behind."""
        self._waiting, self._queued = [], False

    def close(self) -> None:
        """No gradient comes any more: let go of who steps, which holds this in turn."""
        self.forget()
        self._step = lambda _: None

    def _end(self) -> None:
        self._last.add(self._waiting[-1])
        self.take()

    @torch.no_grad()
    def _end_of_backward(self) -> None:
        self._queued = False
        if self._waiting:
            self._end()


def _memory(param: Tensor) -> int:
    """What tells pieces of one tensor from those of others, while both live.

    Not an address: two shards without entries would be alike, and not on ranks that have some.
    """
    assert param.grad is not None
    return int(local(param.grad).untyped_storage()._cdata)
