"""What happens to the part of the gradient outside the subspace: the Residual role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.terms import Term, Wants
from lowrank_optim.tensors.matrix import MatrixView

State = dict[str, Tensor]


class ResidualInputs(NamedTuple):
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
    finite: Tensor | None
    """0-d bool on the device, where the host has not looked: whether G is finite."""


class Residual(Protocol):
    """Asked three times a step: what to project, what to add back, and what to remember."""

    stepped: ClassVar[Sequence[str]]
    """State keys that :meth:`after` overwrites."""
    wants: ClassVar[Wants]
    """What of the rest it uses. For "memory" :meth:`before` makes a matrix of the size of G, which
    lives as long as the step."""

    def init(self, view: MatrixView, like: Tensor) -> State:
        """What it remembers of one matrix, zeros."""
        ...

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a saved state holds what a step may read."""
        ...

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The matrix ``(..., m, n)`` to project."""
        ...

    def after(self, state: State, seen: ResidualInputs) -> Term | None:
        """The term that joins the update."""
        ...

    def keep_(self, state: State, grad: Tensor, finite: Tensor | None) -> None:
        """Remember what is left of ``grad``, as ``before`` gave it: the weights are written."""
        ...


class Forgetful:
    """What residuals have in common that remember nothing of a gradient."""

    stepped: ClassVar[Sequence[str]] = ()
    wants: ClassVar[Wants] = "term"

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""

    def keep_(self, state: State, grad: Tensor, finite: Tensor | None) -> None:
        """Nothing."""
