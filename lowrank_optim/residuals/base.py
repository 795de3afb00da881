"""What happens to the part of the gradient outside the subspace: the Residual role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from lowrank_optim.subspaces.base import Subspace
from lowrank_optim.subspaces.terms import Term, Wants
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.state import State


class ResidualInputs(NamedTuple):
    """What a step knows of one matrix when the residual is asked."""

    grad: Tensor
    """G ``(..., m, n)``, as :meth:`Residual.before` gave it."""
    low: Tensor
    """Its coordinates; of ``-G`` under ``maximize``, as is the direction."""
    direction: Tensor
    """Before bias correction; what a residual adds to it in place joins the update."""
    correction: float | Tensor
    """The factor that corrects it."""
    subspace: Subspace
    finite: Tensor | None
    """0-d bool on the device, where the host has not looked: whether G is finite."""
    whole: tuple[int, int] | None = None
    """Sides of the matrix, where ``grad`` has only some of its columns (default: of ``grad``)."""


class Measured(NamedTuple):
    """What a residual needs of a whole matrix, found from the columns that are here."""

    sums: Tensor
    """``(k, ..., 1, 1)``: those of all columns are the sum over pieces, or the root of squares."""
    norms: bool
    """Whether they are norms, whose squares add up."""
    coords: int
    """How many of them, the first, are of coordinates and not of the gradient."""
    columns: tuple[Tensor, ...]
    """What belongs to each column ``(..., 1, n)``, and is kept for :meth:`Residual.after`."""


class Residual(Protocol):
    """Asked before, during and after a step: what to project, add back, and remember."""

    stepped: ClassVar[Sequence[str]]
    """State keys that :meth:`after` overwrites."""
    memory: ClassVar[Sequence[str]]
    """State keys as large as the gradient, or that go with such: ``state_device`` moves them."""
    wants: ClassVar[Wants]
    """What of the rest it uses. For "memory" :meth:`before` makes a matrix of the size of G, which
    lives as long as the step. For "nothing" a step asks neither for a term nor to keep anything."""

    @property
    def lost(self) -> float:
        """Factor of what a refresh loses of the lifted first moment, which joins its memory."""
        ...

    def init(self, view: MatrixView, like: Tensor) -> State:
        """What it remembers of one matrix, zeros."""
        ...

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a saved state holds what a step may read."""
        ...

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The matrix ``(..., m, n)`` to project."""
        ...

    def before_all(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
        """:meth:`before` of alike matrices, whose kernels may be asked for together."""
        ...

    def measure(self, seen: ResidualInputs) -> Measured | None:
        """What :meth:`after` needs of all columns; None where it needs nothing of others."""
        ...

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """The term that joins the update.

        Args:
            state: of the parameter.
            seen: of the columns that are here.
            measured: what :meth:`measure` found, of all columns (default: of these, which are all).
        """
        ...

    def after_all(
        self,
        states: Sequence[State],
        seen: Sequence[ResidualInputs],
        measured: Sequence[Measured] = (),
    ) -> list[Term | None]:
        """:meth:`after` of alike matrices, whose kernels may be asked for together."""
        ...

    def keep_(self, state: State, grad: Tensor, finite: Tensor | None) -> None:
        """Remember what is left of ``grad``, as ``before`` gave it: the weights are written.

        Where ``finite`` is False nothing changes, ``grad`` included: a first step is rehearsed so.
        """
        ...

    def keep_all_(
        self, states: Sequence[State], grads: Sequence[Tensor], finite: Sequence[Tensor]
    ) -> None:
        """:meth:`keep_` of alike matrices; of all or none ``finite`` is known on the device."""
        ...


class OneByOne:
    """What residuals have in common that ask nothing of a bucket."""

    def before(self, state: State, grad: Tensor) -> Tensor:
        """Of one matrix."""
        raise NotImplementedError

    def before_all(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[Tensor]:
        """One after the other."""
        return [self.before(state, grad) for state, grad in zip(states, grads, strict=True)]

    def keep_(self, state: State, grad: Tensor, finite: Tensor | None) -> None:
        """Of one matrix."""
        raise NotImplementedError

    def keep_all_(
        self, states: Sequence[State], grads: Sequence[Tensor], finite: Sequence[Tensor]
    ) -> None:
        """One after the other."""
        for n, (state, grad) in enumerate(zip(states, grads, strict=True)):
            self.keep_(state, grad, finite[n] if finite else None)

    def after(
        self, state: State, seen: ResidualInputs, measured: Measured | None = None
    ) -> Term | None:
        """Of one matrix."""
        raise NotImplementedError

    def after_all(
        self,
        states: Sequence[State],
        seen: Sequence[ResidualInputs],
        measured: Sequence[Measured] = (),
    ) -> list[Term | None]:
        """One after the other."""
        others = [[x] for x in measured] or [[]] * len(states)
        work = zip(states, seen, others, strict=True)
        return [self.after(state, own, *other) for state, own, other in work]


class Forgetful(OneByOne):
    """What residuals have in common that remember nothing of a gradient."""

    stepped: ClassVar[Sequence[str]] = ()
    memory: ClassVar[Sequence[str]] = ()
    wants: ClassVar[Wants] = "term"

    @property
    def lost(self) -> float:
        """Nothing joins what is not there."""
        return 0.0

    def before(self, state: State, grad: Tensor) -> Tensor:
        """The gradient as it is."""
        return grad

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is kept."""

    def measure(self, seen: ResidualInputs) -> Measured | None:
        """Each column alone."""
        return None

    def keep_(self, state: State, grad: Tensor, finite: Tensor | None) -> None:
        """Nothing."""
