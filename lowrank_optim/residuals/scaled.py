"""Fira: what the subspace does not see, scaled as the rule scaled what it does see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.residuals.base import Forgetful, Measured, ResidualInputs, State
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

    def measure(self, seen: ResidualInputs) -> Measured | None:
        """Squares of the columns' scaled norms, added up; or norms of the matrix."""
        if not self._by_column(seen):
            of_low, of_grad, of_direction = self._norms(seen)
            found = [of_low, of_direction, *([] if of_grad is None else [of_grad])]
            return Measured(torch.stack(found), True, 2, ())
        factor, *squares = self._of_columns(seen)
        sums = torch.stack(squares) if squares else factor.new_zeros(0, *factor.shape[:-1], 1)
        return Measured(sums, False, 0, (factor,))

    def _of_columns(self, seen: ResidualInputs) -> list[Tensor]:
        """The factor of each, and for a limiter the squares of all of scaled G and R."""
        of_low, of_grad, of_direction = self._norms(seen)
        factor = of_direction / (of_low + TINY)
        scaled = [] if of_grad is None else [factor * of_grad, factor * of_low]
        return [factor, *(x.square().sum(-1, keepdim=True) for x in scaled)]

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """One factor for every column of G."""
        low, direction = seen.low, seen.direction
        squares: Sequence[Tensor]
        if self._by_column(seen):
            if measured is None:
                factor, *squares = self._of_columns(seen)
            else:
                (factor,), squares = measured.columns, list(measured.sums)
        else:
            if measured is None:
                of_low, of_all, of_direction = self._norms(seen)
                of_grad = [] if of_all is None else [of_all]
            else:
                of_low, of_direction, *of_grad = measured.sums
            factor = of_direction / (of_low + TINY)
            squares = [(factor * x).square() for x in (*of_grad, of_low)]
        if self.limiter is not None:
            total = self._norm(squares[0], squares[1], seen)
            factor = factor * self._limit_(state["residual_norm"], total, seen.finite)
        scale = seen.subspace.scale
        if self.paper and scale != 1:
            # a P N + a S with S = f (G - P R), as a P (N - (1 - a) f R) + a f (G - a P R)
            direction.addcmul_(low.to(direction.dtype), factor.to(direction.dtype), value=scale - 1)
            factor = factor * scale
        shape = (*seen.grad.shape[:-2], 1, seen.grad.shape[-1])
        return Term("scaled", factor.expand(shape).contiguous())

    def _by_column(self, seen: ResidualInputs) -> bool:
        return self.columns and seen.subspace.by_column

    def _norms(self, seen: ResidualInputs) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of R, of G where there is a limiter, and of the direction: by column or of all."""

        def norm(x: Tensor) -> Tensor:
            if self._by_column(seen):
                (found,) = ops.column_norms([x])
                return found  # type: ignore[no-any-return]
            return ops.matrix_norm(x.flatten(-2).unsqueeze(-2) if x is not seen.grad else x)

        of_low, of_direction = norm(seen.low), norm(seen.direction)
        return of_low, None if self.limiter is None else norm(seen.grad), of_direction

    def _norm(self, whole: Tensor, inside: Tensor, seen: ResidualInputs) -> Tensor:
        """``|S| (..., 1, 1)`` from squares of scaled G and R; 0 where that is rounding noise."""
        b = 1.0 if self.paper else seen.subspace.scale
        left = whole - (2 * b - b * b) * inside
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
