"""Fira, APOLLO: the rest of the gradient, scaled as the rule scaled what the subspace sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.stacked import empty_like_all, stacked
from lowrank_optim.residuals.base import Forgetful, Measured, ResidualInputs
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.state import State
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
        gain: factor of S behind the limiter. APOLLO is ``gain * S`` alone: a = b = 0.
    """

    stepped: ClassVar[Sequence[str]] = ("residual_norm",)

    columns: bool = True
    limiter: float | None = 1.01
    paper: bool = False
    gain: float = 1.0

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
        of_low, of_direction, of_grad = self._norms([seen])
        if not self._by_column(seen):
            return Measured(torch.stack([*of_low, *of_direction, *of_grad]), True, 2, ())
        factor = of_direction[0] / (of_low[0] + TINY)
        squares = [ops.scaled_squares(factor, x) for x in (*of_grad, *of_low)]
        if self.limiter is None:
            return Measured(factor.new_zeros(0, *factor.shape[:-1], 1), False, 0, (factor,))
        return Measured(torch.stack(squares), False, 0, (factor,))

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """One factor for every column of G."""
        (term,) = self.after_all([state], [seen], [] if measured is None else [measured])
        return term

    def after_all(
        self,
        states: Sequence[State],
        seen: Sequence[ResidualInputs],
        measured: Sequence[Measured] = (),
    ) -> list[Term | None]:
        """As of each; what is computed of the norms is one kernel."""
        if measured:
            pairs = zip(states, seen, measured, strict=True)
            factors = [self._of_measured(state, own, found) for state, own, found in pairs]
        else:
            factors = self._factors(states, seen)
        scale, every = seen[0].subspace.scale, stacked(factors)
        if self.paper and scale != 1:
            # a P N + a S with S = f (G - P R), as a P (N - (1 - a) f R) + a f (G - a P R)
            self._add_(seen, every, scale - 1)
            every = every * scale
        if self.gain != 1:
            every = every * self.gain
        shape = (len(seen), *seen[0].grad.shape[:-2], 1, seen[0].grad.shape[-1])
        columns = every.expand(shape).contiguous()
        return [Term("scaled", own) for own in columns.unbind(0)]

    def _factors(self, states: Sequence[State], seen: Sequence[ResidualInputs]) -> list[Tensor]:
        """``(..., 1, n)``, or ``(..., 1, 1)`` where one is that of all columns."""
        lows, directions, grads = self._norms(seen)
        if self.limiter is None:
            return list((stacked(directions) / (stacked(lows) + TINY)).unbind(0))
        dtype = torch.promote_types(lows[0].dtype, directions[0].dtype)
        outs = empty_like_all(lows, lows[0].shape, dtype)
        ops.residual_factors_(
            lows, directions, grads, [state["residual_norm"] for state in states], outs,
            **self._limit(seen[0], dtype), finite=[x.finite for x in seen if x.finite is not None],
        )  # fmt: skip
        return outs

    def _limit(self, seen: ResidualInputs, dtype: torch.dtype) -> dict[str, float]:
        """What the limit is computed with."""
        assert self.limiter is not None
        b = 1.0 if self.paper else seen.subspace.scale
        # sums are exact to a few units of their dtype; coordinates and a basis in bfloat16 bring
        # errors of 3e-4 at most, as they average out
        # (of float16 the basis alone is)
        kept = seen.grad if ops.product_dtype(seen.grad.dtype) == seen.low.dtype else seen.low
        noise = max(4 * torch.finfo(dtype).eps, torch.finfo(kept.dtype).eps / 16)
        share = 2 * b - b * b
        return {"tiny": TINY, "share": share, "noise": noise, "limiter": self.limiter}

    def _of_measured(self, state: State, seen: ResidualInputs, found: Measured) -> Tensor:
        """The factors, from what was found of all columns."""
        if self._by_column(seen):
            (factor,), squares = found.columns, list(found.sums)
        else:
            of_low, of_direction, *of_grad = found.sums
            factor = of_direction / (of_low + TINY)
            squares = [(factor * x).square() for x in (*of_grad, of_low)]
        if self.limiter is None:
            return factor
        limit = self._limit(seen, squares[0].dtype)
        whole, inside = squares
        return ops.limited_(
            factor, whole, inside, state["residual_norm"], **limit, finite=seen.finite
        )

    def _by_column(self, seen: ResidualInputs) -> bool:
        return self.columns and seen.subspace.by_column

    def _add_(self, seen: Sequence[ResidualInputs], factors: Tensor, value: float) -> None:
        """``N <- N + value f R``, where a residual adds to the directions."""
        directions = stacked([own.direction for own in seen])
        dtype = directions.dtype
        lows = stacked([own.low for own in seen])
        directions.addcmul_(lows.to(dtype), factors.to(dtype), value=value)
        if directions.data_ptr() != seen[0].direction.data_ptr():
            torch._foreach_copy_([own.direction for own in seen], list(directions.unbind(0)))

    def _norms(
        self, seen: Sequence[ResidualInputs]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of R, of the directions, and of G where there is a limiter: by column or of all."""
        each = [own.low for own in seen], [own.direction for own in seen]
        grads = [] if self.limiter is None else [own.grad for own in seen]
        if self._by_column(seen[0]):
            of_direction = ops.column_norms(each[1])
            if grads and grads[0].dtype == each[0][0].dtype:  # as a call has one format
                both = ops.column_norms([*each[0], *grads])
                of_low, of_grad = both[: len(seen)], both[len(seen) :]
            else:
                of_low, of_grad = ops.column_norms(each[0]), ops.column_norms(grads)
        else:
            flat = ([x.flatten(-2).unsqueeze(-2) for x in own] for own in each)
            of_low, of_direction, of_grad = map(ops.matrix_norms, (*flat, grads))
        return of_low, of_direction, of_grad
