"""GaLore's basis while gradients say where to go, a random one when noise would choose it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowrank_optim.subspaces.base import register
from lowrank_optim.subspaces.random import drawn, haar
from lowrank_optim.subspaces.refresh import RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.subspaces.svd import SVD


@register("golore")
@dataclass(frozen=True)
class GoLore(SVD):
    """Singular vectors before step ``random_from``, a Haar-random basis from there on.

    Singular vectors of a noisy gradient follow the noise near an optimum, and a run can stop short
    of it; a random basis sees each direction as often as any other.

    Args:
        random_from: the first step with random bases: a number of steps, or a float in [0, 1],
            which is a part of ``total_steps``. 0.8 is the paper's GoLore@20% (default: 0, all of
            the run).
        total_steps: of the run, for ``random_from`` as a part of it.

    References:
        He et al. (2024), arXiv:2410.11289.
    """

    fitted: ClassVar[bool] = False

    random_from: int | float = 0
    total_steps: int | None = None

    def draws(self, count: int) -> bool:
        """Whether a refresh after ``count`` steps is a random one."""
        if isinstance(self.random_from, float):
            assert self.total_steps is not None  # of a group that was checked
            return count >= self.random_from * self.total_steps
        return count >= self.random_from

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """``Q`` of a Gaussian ``(..., m, r)``, or ``U[:, :r]`` of the gradient before."""
        if self.draws(ctx.count):
            return haar(drawn(grad, (*grad.shape[:-1], self.rank), ctx), grad.device)
        return super().find(grad, previous, ctx)

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The same, of all matrices that are due."""
        if not self.draws(ctx.count):
            return (yield from super().searching(grad, previous, ctx))
        x = drawn(grad, (*grad.shape[:-1], self.rank), ctx)
        found: Tensor = yield Ask(haar, (x,), (grad.device,))
        return found

    def spans(self, count: int) -> bool:
        """Only while it is found from the gradient."""
        return not self.draws(count)
