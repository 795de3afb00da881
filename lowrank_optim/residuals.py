"""What happens to the part of the gradient outside the subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from torch import Tensor

from lowrank_optim.matrix import MatrixView

if TYPE_CHECKING:
    from lowrank_optim.subspaces.base import Subspace

State = dict[str, Tensor]


class Term(NamedTuple):
    """The residual's share of the update, in a form that a fused apply takes.

    With a the subspace's scale and R the coordinates of G:

    ============ ==================================
    ``"scaled"`` ``(G - a P R) o columns``
    ``"sign"``   ``gain sign(G - P R)``
    ============ ==================================

    Both are multiplied by the learning rate and by the bias correction of the direction.
    """

    kind: Literal["scaled", "sign"]
    columns: Tensor | None = None
    """One factor per column of the canonical view, ``(..., 1, n)`` in float32."""
    gain: float = 1.0


class Seen(NamedTuple):
    """What a step knows of one matrix when the residual is asked."""

    grad: Tensor
    """G ``(..., m, n)``, as :meth:`Residual.before` gave it."""
    low: Tensor
    """Its coordinates; of ``-G`` under ``maximize``, as is the direction."""
    direction: Tensor
    """Before bias correction."""
    correction: float
    """The factor that corrects it."""
    subspace: Subspace
    sound: Tensor | None
    """0-d bool on the device, where the host has not looked: whether G is finite."""


class Residual(Protocol):
    """Asked twice a step: for the gradient to project, and for the part to add back."""

    def init(self, view: MatrixView, like: Tensor) -> State:
        """What it remembers of one matrix, zeros."""
        ...

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The matrix ``(..., m, n)`` to project."""
        ...

    def after(self, state: State, seen: Seen) -> Term | None:
        """The term that joins the update."""
        ...


class Drop:
    """GaLore: what the subspace does not see is not used."""

    def init(self, view: MatrixView, like: Tensor) -> State:
        """Nothing."""
        return {}

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad

    def after(self, state: State, seen: Seen) -> Term | None:
        """Nothing."""
        return None
