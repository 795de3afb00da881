"""What happens to the part of the gradient outside the subspace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.matrix import MatrixView
from lowrank_optim.state_checks import check_finite

if TYPE_CHECKING:
    from lowrank_optim.subspaces.base import Subspace

State = dict[str, Tensor]


class Term(NamedTuple):
    """The residual's share of the update, in a form that a fused apply takes.

    With a the subspace's scale and R the coordinates of G:

    ============ ==================================
    ``"scaled"`` ``(G - a P R) o columns``
    ``"sign"``   ``gain sign(G - P R)``
    ``"raw"``    ``gain (G - P R)``
    ============ ==================================

    All are multiplied by the learning rate and by the bias correction of the direction.
    """

    kind: Literal["scaled", "sign", "raw"]
    columns: Tensor | None = None
    """One factor per column of the canonical view, ``(..., 1, n)`` in float32."""
    gain: float | Tensor = 1.0

    def times(self, factor: Tensor) -> Term:
        """The term times a 0-d tensor: a learning rate that lives on the device."""
        if self.columns is not None:
            return self._replace(columns=self.columns * factor.to(self.columns.dtype))
        return self._replace(gain=self.gain * factor)

    def of_(self, rest: Tensor) -> Tensor:
        """``gain f(rest)`` in place, for ``rest = G - P R``: a term that has no columns.

        Raises:
            ValueError: it has, or is of a kind that no one knows.
        """
        if self.kind not in FREE:
            raise unknown_kind(self.kind, FREE)
        return FREE[self.kind](rest).mul_(self.gain)


FREE: dict[str, Callable[[Tensor], Tensor]] = {"sign": Tensor.sign_, "raw": lambda rest: rest}
"""f of each kind of term that has no columns, in place."""


KINDS = ("scaled", *FREE)
"""Every kind of term."""


def unknown_kind(kind: str, allowed: Iterable[str]) -> ValueError:
    """The error of a subspace that is given a term which it cannot apply."""
    names = ", ".join(repr(name) for name in allowed)
    return ValueError(f"the kind of a residual's term must be one of {names}, got {kind!r}")


class Seen(NamedTuple):
    """What a step knows of one matrix when the residual is asked."""

    grad: Tensor
    """G ``(..., m, n)``, as :meth:`Residual.before` gave it."""
    low: Tensor
    """Its coordinates; of ``-G`` under ``maximize``, as is the direction."""
    direction: Tensor
    """Before bias correction; what a residual adds to it in place joins the update."""
    correction: float
    """The factor that corrects it."""
    subspace: Subspace
    sound: Tensor | None
    """0-d bool on the device, where the host has not looked: whether G is finite."""


class Residual(Protocol):
    """Asked three times a step: what to project, what to add back, and what to remember."""

    stepped: ClassVar[Sequence[str]]
    """State keys that :meth:`after` overwrites."""
    feeds_back: ClassVar[bool]
    """Whether what a step does not use is projected with the next gradient: :meth:`before` then
    makes a matrix of the size of G, which lives as long as the step."""

    def init(self, view: MatrixView, like: Tensor) -> State:
        """What it remembers of one matrix, zeros."""
        ...

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a saved state holds what a step may read."""
        ...

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The matrix ``(..., m, n)`` to project."""
        ...

    def after(self, state: State, seen: Seen) -> Term | None:
        """The term that joins the update."""
        ...

    def keep_(self, state: State, grad: Tensor, sound: Tensor | None) -> None:
        """Remember what is left of ``grad``, as ``before`` gave it: the weights are written."""
        ...


class Forgetful:
    """What residuals have in common that remember nothing of a gradient."""

    stepped: ClassVar[Sequence[str]] = ()
    feeds_back: ClassVar[bool] = False

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""

    def keep_(self, state: State, grad: Tensor, sound: Tensor | None) -> None:
        """Nothing."""


class Drop(Forgetful):
    """GaLore: what the subspace does not see is not used."""

    def init(self, view: MatrixView, like: Tensor) -> State:
        """Nothing."""
        return {}

    def after(self, state: State, seen: Seen) -> Term | None:
        """Nothing."""
        return None


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

    def after(self, state: State, seen: Seen) -> Term:
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
            factor = factor * self._limit_(state["residual_norm"], total, seen.sound)
        scale = seen.subspace.scale
        if self.paper and scale != 1:
            # a P N + a S with S = f (G - P R), as a P (N - (1 - a) f R) + a f (G - a P R)
            direction.addcmul_(low.to(direction.dtype), factor.to(direction.dtype), value=scale - 1)
            factor = factor * scale
        shape = (*batch, 1, seen.grad.shape[-1])
        return Term("scaled", factor.expand(shape).contiguous())

    def _norm(self, grad: Tensor, low: Tensor, seen: Seen) -> Tensor:
        """``|S| (..., 1, 1)`` from the scaled norms of G and R; 0 where that is rounding noise."""
        b = 1.0 if self.paper else seen.subspace.scale
        whole = grad.square().sum(-1, keepdim=True)
        left = whole - (2 * b - b * b) * low.square().sum(-1, keepdim=True)
        # sums are exact to a few units of their dtype; coordinates and a basis in bfloat16 bring
        # errors of 3e-4 at most, as they average out
        noise = max(4 * torch.finfo(whole.dtype).eps, torch.finfo(seen.low.dtype).eps / 16)
        return torch.where(left <= noise * whole, 0.0, left).sqrt()  # NaN stays NaN

    def _limit_(self, before: Tensor, norm: Tensor, sound: Tensor | None) -> Tensor:
        """The factor that keeps the growth of ``norm (..., 1, 1)`` within the limit.

        Where the step before had no residual there is nothing to grow from, and no limit: capped at
        1.01e-8, as in the release, it would take 1,388 steps to come back to 1.
        """
        assert self.limiter is not None
        last = before.reshape(norm.shape)
        allowed = self.limiter * (last + TINY) / norm
        limit = torch.where(last > 0, allowed.clamp(max=1.0), 1.0)
        new = norm * limit
        fine = new.isfinite() if sound is None else new.isfinite() & sound
        last.copy_(torch.where(fine, new, last))
        return limit


@dataclass(frozen=True)
class Free(Forgetful):
    """FRUGAL: the rest of the gradient moves the weights by a rule that keeps no state.

    Args:
        kind: ``"sign"`` or ``"raw"``.
        gain: factor of its step.
    """

    kind: Literal["sign", "raw"]
    gain: float = 1.0

    def init(self, view: MatrixView, like: Tensor) -> State:
        """Nothing."""
        return {}

    def after(self, state: State, seen: Seen) -> Term | None:
        """``gain f(G - P R)``; nothing where that is rounding, of which a sign makes full steps."""
        fresh = bool(state["refresh_step"] == state["step"] - 1)
        m, n = seen.grad.shape[-2:]
        if seen.subspace.complete(m, n, fresh):
            return None
        return Term(self.kind, gain=self.gain / seen.correction)
