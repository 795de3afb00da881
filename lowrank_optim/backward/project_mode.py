"""``mode="project"``: each gradient becomes its coordinates inside backward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lowrank_optim.backward.clipping import clip_together_, refresh_ahead
from lowrank_optim.backward.handle import InBackward
from lowrank_optim.backward.projecting import (
    check_projecting,
    first_projected,
    first_state,
    items_of,
    projected,
)
from lowrank_optim.backward.shards import alone, keep_shard, shard_of, stays_whole
from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.refresh import refresh_
from lowrank_optim.engine.schedule import basis_due
from lowrank_optim.engine.sharded.local import weights_here
from lowrank_optim.engine.sharded.replicas import refresh_alike
from lowrank_optim.engine.undo import Undo
from lowrank_optim.groups import notices
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.sharding.collectives import Form, form
from lowrank_optim.sharding.parts import is_sharded
from lowrank_optim.tensors.projected_grad import ProjectedGrad, projection


class ProjectMode(InBackward):
    """Each gradient becomes its coordinates; a step starts from them."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        max_norm: float | None,
        first_basis: str,
        coords_dtype: str,
        process_group: dist.ProcessGroup | None = None,
        accumulation_steps: int = 1,
    ) -> None:
        self.first_basis, self.coords_dtype = first_basis, coords_dtype
        # equal noise on every rank would not average out
        self._salt = () if process_group is None else (dist.get_rank(process_group),)
        self._low: dict[Any, list[Form]] = {}
        """Forms of coordinates, once known, by what they depend on."""
        super().__init__(optimizer, max_norm, process_group, accumulation_steps)

    def _check(self) -> None:
        check_projecting(self.optimizer)
        names, plans = self.whole_shards, [plan for _, plan in items_of(self.optimizer)]
        if names:
            warnings.warn(
                f"{len(names)} of {sum(plan.subspace is not None for plan in plans)} matrices keep "
                "the whole of their shards until the step, as mode='project' sends nothing: the "
                f"coordinates of {names[0]} are of rows on several ranks, or of both sides. Give "
                "fully_shard the shard_placement_fn of lowrank_optim.distributed, and project one "
                "side; handle.whole_shards has their names",
                stacklevel=notices.users_level(),
            )

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        if param.grad is not None:
            self._in_form(param)

    def _in_form(self, param: Tensor) -> None:
        if is_sharded(param):
            self._shard_in_form(param)
            return
        grad = param.grad
        if isinstance(grad, ProjectedGrad):
            if grad.spill is None:
                return
            grad = param.grad = grad.spill  # it was zeroed in place: start again
        assert grad is not None
        basis = None if grad.is_sparse else self._basis(param)
        if basis is None:
            return
        plan, state, strategies = basis
        first = self.first_basis == "micro" and int(state["refresh_step"]) < 0
        begin = first_projected if first else projected
        param.grad = begin(plan, state, grad, strategies, self.coords_dtype, self._salt)

    def _shard_in_form(self, param: Tensor) -> None:
        """The same of the part of a gradient that is here, inside its DTensor."""
        kept = projection(param.grad)
        if kept is not None:
            if kept.spill is None:
                return
            keep_shard(param, kept.spill)
        shard = shard_of(self._find(param)[1])
        if shard is None:
            return
        basis = self._basis(param)
        if basis is None:
            keep_shard(param, alone(shard))
            return
        plan, state, strategies = basis
        own = weights_here(plan)  # a gradient there would live as long as the coordinates
        assert plan.part is not None
        salt = (plan.part.place,)  # equal noise on all ranks is no noise; copies round alike
        keep_shard(param, projected(own, state, shard, strategies, self.coords_dtype, salt))

    @property
    def whole_shards(self) -> tuple[str, ...]:
        """Names of DTensors that are never projected."""
        return tuple(plan.name for _, plan in items_of(self.optimizer) if stays_whole(plan))

    def _basis(self, param: Tensor) -> tuple[ParamPlan, State, Strategies] | None:
        """What a gradient is projected by in this step; None where it stays whole."""
        group, plan = self._find(param)
        if plan.subspace is None or not plan.alone or stays_whole(plan):
            return None
        strategies = self.optimizer._strategies(group)
        if plan.sharded:
            if not self.optimizer.state.get(param):
                return None  # ranks find the first basis together, in a step
            state = self.optimizer._state_of(plan, strategies)
            return None if basis_due(plan, state, strategies) else (plan, state, strategies)
        state = self.optimizer.state.get(param) or first_state()
        due = basis_due(plan, state, strategies)  # an accelerator has then said if there is one
        first = int(state["refresh_step"]) < 0 and self.first_basis == "micro"
        return None if due and not first else (plan, state, strategies)

    def _forms(self, param: Tensor) -> Sequence[Form]:
        basis = self._basis(param)
        if basis is None:
            return super()._forms(param)
        plan, state, strategies = basis
        key = plan.view, plan.subspace, param.dtype, param.device
        if key not in self._low:  # asked of a gradient of zeros, which takes no memory
            zero = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
            like = projected(plan, state, zero, strategies, self.coords_dtype, self._salt)
            self._low[key] = [form(x) for x in like.coords.values()]
        return self._low[key]

    @torch.no_grad()
    def _settle(self) -> None:
        """Clip by the norm of what will be applied: bases that are due are refreshed before."""
        if self.max_norm is None:
            return
        self.optimizer._make_state()
        shards = [plan for _, plan in items_of(self.optimizer) if plan.sharded]
        if shards:
            matrices = self._shards_ahead()
        whole = []
        for group, plan in items_of(self.optimizer):
            grad = plan.param.grad
            if plan.subspace is None or not plan.alone or plan.sharded:
                continue
            if grad is None or isinstance(grad, ProjectedGrad):
                continue
            strategies = self.optimizer._strategies(group)
            whole.append((plan, self.optimizer._state_of(plan, strategies), strategies))
        if self._ranks is not None:
            with Undo() as undo:
                refresh_alike(whole, self.optimizer._replicas.known, undo)
        for plan, state, strategies in whole:
            grad = plan.param.grad
            assert plan.view is not None and grad is not None
            based = int(state["refresh_step"]) >= 0
            if basis_due(plan, state, strategies):
                step = int(state["step"])
                refresh_(plan, state, plan.view.of(grad), step, strategies, later=True)
            plan.param.grad = projected(
                plan, state, grad, strategies, self.coords_dtype, self._salt, based
            )
        plain = [plan.param for _, plan in items_of(self.optimizer) if not plan.sharded]
        if shards:
            clip_together_(shards, matrices, plain, self.max_norm)
        else:
            clip_grad_norm_(plain, self.max_norm)

    def _shards_ahead(self) -> list[tuple[ParamPlan, State, Strategies]]:
        """Matrices that lie on several ranks, with bases that are not due, in the form for that."""
        found = []
        for group, plan in items_of(self.optimizer):
            if plan.sharded and plan.subspace is not None and plan.alone:
                strategies = self.optimizer._strategies(group)
                found.append((plan, self.optimizer._state_of(plan, strategies), strategies))
        refresh_ahead(found)
        for plan, _, _ in found:
            if plan.param.grad is not None and projection(plan.param.grad) is None:
                self._shard_in_form(plan.param)
        return found

    def _forget(self, param: Tensor) -> None:
        """Nothing empty is left behind, which would keep later gradients out."""
        kept = projection(param.grad)
        if kept is not None and kept.empty:
            param.grad = None
        elif kept is not None and kept.spill is not None:  # it came before its hook was taken
            if is_sharded(param):
                keep_shard(param, kept.spill)
            else:
                param.grad = kept.spill

    def remove(self) -> None:
        """As of every mode."""
        for param in self._hooks:
            self._forget(param)
        super().remove()
