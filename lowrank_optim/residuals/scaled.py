"""Fira: what the subspace does not see, scaled as the rule scaled what it does see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.residuals.base import Forgetful, ResidualInputs, State
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_finite

TINY = 1e-8
"""Added to norms that divide, as released."""


@dataclass(frozen=True)
class Scaled(Forgetful):
    r"""Fira: what the subspace does not see, scaled as the rule scaled what it does see.

    .. math::
        S_j = \varphi_j (G_j - b P R_j), \qquad
        \varphi_j = |N_j| / (|R_j| + 10^{-8}), \qquad
        |S| \le \gamma |S_{\text{before}}|

    S never exists: for orthonormal P, :math:`|G_j - b P R_j|^2 = |G_j|^2 - (2b - b^2) |R_j|^2`, and
    the term needs no more than one factor a column.

    Args:
        columns: one factor a column, or else one a matrix (also where coordinates have no columns
            of the matrix: two-sided ones).
        limiter: γ, the growth of ``|S|`` that a step may bring; None limits nothing.
        paper: b = 1, and the update is ``a (P N + S)``; else as released, b = a and ``a P N + S``.
    """

    stepped: ClassVar[Sequence[str]] = ("residual_norm",)

    columns: bool = True
    limiter: float | None = 1.01
    paper: bool = False

    def init(self, view: MatrixView, like: Tensor) -> State:
        """``|S|`` of the step before: a scalar per matrix, in the dtype of arithmetic.

        Kept without a limiter too: one may be set in mid-run, or a checkpoint loaded under one.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"residual_norm": like.new_zeros(view.batch, dtype=dtype)}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Norms."""
        check_finite(state, "residual_norm", least=0)

    def after(self, state: State, seen: ResidualInputs) -> Term:
        """One factor for every column of G."""
        low, direction = seen.low, seen.direction
        by_column = self.columns and seen.subspace.by_column
        batch = seen.grad.shape[:-2]

        def norm(x: Tensor) -> Tensor:
            if by_column:
                (found,) = ops.column_norms([x])
                return found  # type: ignore[no-any-return]
            return ops.matrix_norm(x.reshape(*batch, 1, -1) if x is not seen.grad else x)

        of_low = norm(low)
        factor = norm(direction) / (of_low + TINY)
        if self.limiter is not None:
            of_grad = norm(seen.grad)
            total = self._norm(factor * of_grad, factor * of_low, seen)
            factor = factor * self._limit_(state["residual_norm"], total, seen.finite)
        scale = seen.subspace.scale
        if self.paper and scale != 1:
            # a P N + a S with S = f (G - P R), as a P (N - (1 - a) f R) + a f (G - a P R)
            direction.addcmul_(low.to(direction.dtype), factor.to(direction.dtype), value=scale - 1)
            factor = factor * scale
        shape = (*batch, 1, seen.grad.shape[-1])
        return Term("scaled", factor.expand(shape).contiguous())

    def _norm(self, grad: Tensor, low: Tensor, seen: ResidualInputs) -> Tensor:
        """``|S| (..., 1, 1)`` from the scaled norms of G and R; 0 where that is rounding noise."""
        b = 1.0 if self.paper else seen.subspace.scale
        whole = grad.square().sum(-1, keepdim=True)
        left = whole - (2 * b - b * b) * low.square().sum(-1, keepdim=True)
        # sums are exact to a few units of their dtype; coordinates and a basis in bfloat16 bring
        # errors of 3e-4 at most, as they average out
        noise = max(4 * torch.finfo(whole.dtype).eps, torch.finfo(seen.low.dtype).eps / 16)
        return torch.where(left <= noise * whole, 0.0, left).sqrt()  # NaN stays NaN

    def _limit_(self, before: Tensor, norm: Tensor, finite: Tensor | None) -> Tensor:
        """The factor that keeps the growth of ``norm (..., 1, 1)`` within the limit.

        Where the step before had no residual there is nothing to grow from, and no limit: capped at
        1.01e-8, as in the release, it would take 1,388 steps to come back to 1.
        """
        assert self.limiter is not None
        last = before.reshape(norm.shape)
        allowed = self.limiter * (last + TINY) / norm
        limit = torch.where(last > 0, allowed.clamp(max=1.0), 1.0)
        new = norm * limit
        fine = new.isfinite() if finite is None else new.isfinite() & finite
        last.copy_(torch.where(fine, new, last))
        return limit
