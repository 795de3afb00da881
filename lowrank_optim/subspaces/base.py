"""Which coordinates of a gradient are optimised: the Subspace role and the projector registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext, Touched
from lowrank_optim.subspaces.searches import Searching
from lowrank_optim.subspaces.shared import Shared
from lowrank_optim.subspaces.target import Target, guarded
from lowrank_optim.subspaces.terms import Term, Wants
from lowrank_optim.tensors.matrix import MatrixView, matrix_view, row_view
from lowrank_optim.tensors.state import State as State


@dataclass(frozen=True)
class Subspace(ABC):
    """Coordinates of a gradient, and the way back. Holds hyper-parameters only, never a tensor."""

    rank: int
    scale: float = 1.0

    needs_grad: ClassVar[bool] = True
    """Whether a refresh looks at the gradient, and so waits for one that says something."""
    sees_all: ClassVar[bool] = True
    """Whether an entry of the gradient that is not finite shows in the coordinates."""
    fitted: ClassVar[bool] = False
    """Whether a basis of full rank spans the very gradient that it was found from."""
    reads_grad: ClassVar[bool] = True
    """Whether what a refresh finds depends on more of the gradient than its shape."""
    indexed: ClassVar[bool] = False
    """Whether :meth:`changed` knows how coordinates moved."""
    selects: ClassVar[bool] = False
    """Whether :meth:`refresh_` minds :attr:`RefreshContext.fine`; if not, the host looks before."""
    takes_wide: ClassVar[bool] = False
    """Whether :meth:`push_all_` writes copies of the weights in float32 as it would the weights."""
    of_weight: ClassVar[bool] = False
    """Whether its coordinates are of factors of W: a refresh looks at W and not at the gradient."""

    counters: ClassVar[tuple[str, ...]] = ()
    """Numbers of the host in the state that a refresh advances by one, whatever the device says of
    it: they go back where it did not come about."""

    @property
    def blend(self) -> float:
        """Share of the lifted first moment in what a basis is found from."""
        return 0.0

    @property
    def whole(self) -> str | None:
        """Why every rank must have all of a matrix, and what to use in its place, as a clause.

        None where columns of it can be stepped alone.
        """
        return None

    @property
    def decays_weight(self) -> bool:
        """Whether weight decay multiplies W itself, by the factor that :meth:`push_` is given."""
        return True

    def reproducible(self, count: int) -> bool:
        """Whether a refresh after ``count`` steps gives the same bits on every machine."""
        return False

    def balanced(self, count: int) -> Sequence[str]:
        """Entries that a refresh after ``count`` steps makes of themselves alone, whole matrices.

        One rank does, by :meth:`balancing_`; all finish the refresh alone, and find True in
        ``ctx.seen``.
        """
        return ()

    def balancing_(self, state: State) -> Searching[None]:
        """What a refresh does to the entries of :meth:`balanced`, of several matrices at once."""
        yield from ()

    moves_weights: ClassVar[bool] = False
    """Whether a refresh writes into the weights too."""

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What coordinates refer to: state kept under one subspace is that of another if equal."""
        return type(self).__name__, self.rank

    def pushed(self, state: State) -> Iterable[str]:
        """State keys that :meth:`push_` overwrites, beside the weights."""
        return ()

    def refreshed(self, state: State) -> Iterable[str]:
        """State keys that :meth:`refresh_`, or moments that follow it, may overwrite."""
        return list(state)

    def touched(self, state: State, view: MatrixView, count: int) -> Touched | None:
        """What a refresh after ``count`` steps may overwrite of :meth:`refreshed`; None for all."""
        return None

    @classmethod
    def side(cls, proj_type: str) -> str:
        """The side that it projects where a group asks for ``proj_type``."""
        return proj_type

    @classmethod
    def limit(cls, view: MatrixView) -> int:
        """The most directions that it can have."""
        return view.full_rank

    @classmethod
    def directions(cls, rank: int | float, view: MatrixView) -> int:
        """``rank`` as a number of directions, not yet limited."""
        return view.directions(rank)

    @classmethod
    def covers(cls, rank: int | float, view: MatrixView) -> bool:
        """Whether ``rank`` leaves nothing out."""
        return cls.directions(rank, view) >= cls.limit(view)

    @classmethod
    def from_group(cls, group: dict[str, Any], view: MatrixView) -> Self:
        """The subspace that a parameter group asks for: its fields are group keys."""
        own = {f.name: group[f.name] for f in fields(cls) if f.name in group}
        own["rank"] = min(cls.directions(group["rank"], view), cls.limit(view))
        return cls(**own)

    def sharing(self, shared: Shared) -> Self:
        """This subspace with ``shared`` of the optimizer, if it shares anything."""
        return self

    def prepare(self, view: MatrixView, like: Tensor) -> None:  # noqa: B027
        """Build what a step will keep in :class:`Shared`, so that estimates count it."""

    def refuses(self, wants: Wants) -> str | None:
        """Why it does not go with a residual that wants so much; None if it does."""
        return None

    @abstractmethod
    def init(self, view: MatrixView, param: Tensor) -> State:
        """State of one matrix before its first refresh."""

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:  # noqa: B027
        """Raise unless ``state``, about to be loaded, holds what a step may read.

        Keys and shapes are those of :meth:`init`; values are not known yet: indices that are
        followed, factors that are multiplied. By :mod:`lowrank_optim.tensors.values`, as a rule.

        Raises:
            ValueError: with the key, what was found, and what is allowed.
        """

    def look(self, grad: Tensor) -> tuple[Tensor, Any]:
        """A number that is 0 or not finite where ``grad`` tells nothing, and what else was seen."""
        return torch.linalg.vector_norm(ops.matrix_norm(grad)), None

    def looking(self, grad: Tensor) -> Searching[tuple[Tensor | None, Any]]:
        """:meth:`look`, asking for what several matrices can share a call for.

        None where :meth:`refreshing_` finds out by itself, on an accelerator, and says so.
        """
        yield from ()
        return self.look(grad)

    def of_columns(self, start: int, stop: int, n: int) -> Self:
        """This subspace for columns ``start`` to ``stop`` of ``n``, of which alone a step knows."""
        return self

    def scores(self, grad: Tensor) -> Tensor | None:
        """What a refresh sees of columns ``(m, n_i)``, where that of all columns is their sum.

        A refresh then finds the sum in ``ctx.seen``. None where it must see the whole matrix.
        """
        return None

    def changed(self, before: State, after: State) -> dict[str, BasisChange] | None:
        """How coordinates moved between two states, where sets of indices tell; else None."""
        return None

    @abstractmethod
    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Choose new coordinates from ``grad (..., m, n)``; amortised over the refresh gap."""

    def refreshing_(
        self, state: State, grad: Tensor, ctx: RefreshContext
    ) -> Searching[dict[str, BasisChange]]:
        """:meth:`refresh_`, asking for what several matrices can share a call for."""
        yield from ()
        return self.refresh_(state, grad, ctx)

    @abstractmethod
    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """Shape of each coordinate, known before any gradient."""

    @abstractmethod
    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """Coordinates of ``grad (..., m, n)``, every step."""

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """:meth:`coords` of alike matrices, whose kernels may be asked for together."""
        found = []
        for state, grad in zip(states, grads, strict=True):
            found.append(self.coords(state, grad))
        return found

    def bases(self, state: State, view: MatrixView) -> list[Tensor]:
        """Orthonormal columns that the coordinates refer to, for tests: P, and Q if two-sided."""
        raise NotImplementedError

    @abstractmethod
    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """``W <- decay W - lr (lift(update) + term)``; state changes when W has, or not at all."""

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """:meth:`push_` of alike matrices, whose kernels may be asked for together.

        Yields:
            The number of each matrix once its weights are written: a step that fails later must
            not put its state back.
        """
        for n, own in enumerate(zip(guarded(intos), states, updates, terms, strict=True)):
            self.push_(*own)
            yield n

    def takes_step(self, param: Tensor, term: Term | None) -> bool:
        """Whether :meth:`push_all_` minds :attr:`Target.step` for weights like ``param``.

        If not, updates and terms are multiplied by a step size that is on the device before.
        """
        return False

    def across(self, into: Target, state: State, update: dict[str, Tensor]) -> Tensor | None:
        """What :meth:`push_` must know of all columns, as sums over those that are here.

        None where a column moves by itself. The arguments are those of :meth:`push_`.
        """
        return None

    def lr_factor(self, since: float | Tensor) -> float | Tensor:
        """Factor of the learning rate, ``since`` steps after the last refresh.

        A number, or ``()`` on the device where no host may know; the factor is then there too.
        """
        return 1.0

    @property
    def by_column(self) -> bool:
        """Whether a column of the coordinates is the share of that column of the matrix."""
        return True

    def applies_grad(self, term: Term | None) -> bool:
        """Whether :meth:`push_` adds something of the gradient itself."""
        return term is not None

    def spans(self, count: int) -> bool:
        """Whether a basis of full rank found after ``count`` steps spans the gradient it is of."""
        return self.fitted

    def complete(self, m: int, n: int, fresh: int | None) -> bool:
        """Whether all outside it is rounding, for a gradient ``(..., m, n)``.

        Args:
            m: the projected dimension.
            n: the other one.
            fresh: steps before the refresh, if that was from this very gradient; else None.
        """
        return False


PROJECTORS: dict[str, type[Subspace]] = {}
_P = TypeVar("_P", bound=type[Subspace])


def register(name: str) -> Callable[[_P], _P]:
    """Class decorator: make a projector available as ``projector=name``.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> import lowrank_optim
        >>> "rsvd" in lowrank_optim.PROJECTORS
        True
    """

    def wrap(cls: _P) -> _P:
        if name in PROJECTORS:
            raise ValueError(f"a projector named {name!r} is registered already")
        PROJECTORS[name] = cls
        return cls

    return wrap


def make_projector(group: dict[str, Any], view: MatrixView) -> Subspace:
    """The projector that a parameter group asks for, with the rank that ``view`` allows."""
    name = "rows" if group["rank"] == 0 else group["projector"]  # nothing needs no basis
    return PROJECTORS[name].from_group(group, view)


def view_for(group: dict[str, Any], shape: Sequence[int]) -> MatrixView | None:
    """A parameter of ``shape`` as the group's projector sees it; None where it is no matrix."""
    side = PROJECTORS[group["projector"]].side(group["proj_type"])
    if group.get("layers") is not None:
        return row_view(shape)  # of a layer that takes turns as a whole
    return matrix_view(shape, side, group.get("flatten", False))
