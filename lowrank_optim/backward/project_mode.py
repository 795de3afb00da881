"""``mode="project"``: each gradient becomes its coordinates inside backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lowrank_optim.backward.handle import InBackward
from lowrank_optim.backward.projecting import (
    check_projecting,
    first_projected,
    first_state,
    items_of,
    projected,
)
from lowrank_optim.engine.refresh import basis_due, refresh_
from lowrank_optim.optimizer import LowRankOptimizer
from lowrank_optim.tensors.projected_grad import ProjectedGrad


class ProjectMode(InBackward):
    """Each gradient becomes its coordinates; a step starts from them."""

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        max_norm: float | None,
        first_basis: str,
        coords_dtype: str,
    ) -> None:
        self.first_basis, self.coords_dtype = first_basis, coords_dtype
        super().__init__(optimizer, max_norm)

    def _check(self) -> None:
        check_projecting(self.optimizer)

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        grad = param.grad
        if isinstance(grad, ProjectedGrad):
            if grad.spill is None:
                return
            grad = param.grad = grad.spill  # it was zeroed in place: start again
        assert grad is not None
        group, plan = self._find(param)
        if plan.subspace is None or not plan.alone or grad.is_sparse:
            return
        strategies = self.optimizer._strategies(group)
        state = self.optimizer.state.get(param) or first_state()
        first = int(state["refresh_step"]) < 0
        if first and self.first_basis == "micro":
            param.grad = first_projected(plan, state, grad, strategies, self.coords_dtype)
        elif not basis_due(plan, state, strategies):
            param.grad = projected(plan, state, grad, strategies, self.coords_dtype)

    @torch.no_grad()
    def _settle(self) -> None:
        """Clip by the norm of what will be applied: bases that are due are refreshed before."""
        if self.max_norm is None:
            return
        self.optimizer._make_state()
        for group, plan in items_of(self.optimizer):
            grad = plan.param.grad
            if plan.subspace is None or not plan.alone:
                continue
            if grad is None or isinstance(grad, ProjectedGrad):
                continue
            assert plan.view is not None
            strategies = self.optimizer._strategies(group)
            state = self.optimizer._state_of(plan, strategies)
            if basis_due(plan, state, strategies):
                refresh_(plan, state, plan.view.of(grad), int(state["step"]), strategies)
            plan.param.grad = projected(plan, state, grad, strategies, self.coords_dtype)
        clip_grad_norm_([plan.param for _, plan in items_of(self.optimizer)], self.max_norm)

    def remove(self) -> None:
        """As of every mode; nothing empty is left behind, which would keep later gradients out."""
        for param in self._hooks:
            if isinstance(param.grad, ProjectedGrad) and param.grad.empty:
                param.grad = None
        super().remove()
