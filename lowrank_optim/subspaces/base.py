"""Which coordinates of a gradient are optimised: the Subspace role and the projector registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowrank_optim import ops
from lowrank_optim.subspaces.eigenvectors import Searching, alone
from lowrank_optim.subspaces.terms import KINDS, Term, Wants, unknown_kind
from lowrank_optim.tensors.matrix import MatrixView, matrix_view
from lowrank_optim.tensors.stacked import empty_like_all
from lowrank_optim.tensors.values import check_finite

State = MutableMapping[str, Tensor]
Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The Reduce of one process: nothing to add up."""
    return x


class BasisChange(NamedTuple):
    """How a refresh moved one coordinate; the Transport decides what the moments do about it."""

    rotation: Callable[[], Tensor] | None = None
    """Lazily ``P_new^T P_old (..., r, r)``, acting on the rows of the coordinate."""
    right: Callable[[], Tensor] | None = None
    """The same for the columns, when both sides are projected."""
    source: Tensor | None = None
    """``(..., r)`` the old row that feeds each new one, -1 for a new one: sets of indices."""
    source_right: Tensor | None = None
    """The same for the columns, when both sides are projected."""
    fresh: Sequence[slice] = ()
    """Rows whose moments and ages start from zero whatever ``on_refresh`` says; others stay."""
    carry: Callable[[Tensor], Tensor] | None = None
    """An exact map of a moment that has no rows to speak of: a set of single entries."""
    low: Tensor | None = None
    """The new coordinates of the gradient, where the search for them came by."""
    ok: Tensor | None = None
    """0-d bool on the device, where :attr:`RefreshContext.fine` is: False if nothing moved."""


class Shared:
    """What all matrices of an optimizer have in common: rebuilt when it is needed, never saved."""

    def __init__(self) -> None:
        self._held: dict[Any, tuple[Any, ...]] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is kept under ``key``: a tuple, tensors among it; made at the first call."""
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [x for parts in self._held.values() for x in parts if isinstance(x, Tensor)]


@dataclass(frozen=True)
class RefreshContext:
    """All else that a refresh may look at."""

    view: MatrixView
    generator: torch.Generator
    """Seeded by (seed, uid, count): the same on every rank and after a resume."""
    uid: int = 0
    """What stands for the parameter: a hash of its name, or its place where it has none."""
    count: int = 0
    """Steps taken before this refresh."""
    reduce: Reduce = identity
    """Sum over the ranks that share this matrix."""
    param: Tensor | None = None
    """W ``(..., m, n)``, for subspaces that are factors of it."""
    seen: Any = None
    """What :meth:`Subspace.look` found on its way."""
    fine: Tensor | None = None
    """0-d bool on an accelerator: whether the gradient is finite and not zero, which its host has
    not asked. Where it is False nothing may move. None where the host knows that it is True."""
    first: bool = False
    """Whether there was no refresh before."""


class Target(NamedTuple):
    """What an update is added to, and how."""

    param: Tensor
    """W ``(..., m, n)``, any strides."""
    grad: Tensor
    """G, alike."""
    low: Tensor | None
    """Its coordinates, where there is one coordinate."""
    lr: float
    """Learning rate times the bias correction."""
    decay: float | Tensor = 1.0
    """Factor of the weights."""
    rounding: ops.Noise | None = None
    """Of the stochastic rounding into bfloat16; None rounds to nearest."""
    finite: Tensor | None = None
    """0-d bool on the device; where False the weights must stay as they are."""
    across: Tensor | None = None
    """Sums over all columns, by :meth:`Subspace.across`, where W has only some of them."""

    def guarded_decay(self) -> float | Tensor:
        """The decay, 1 where the gradient is not finite."""
        if self.finite is None or (isinstance(self.decay, float) and self.decay == 1):
            return self.decay
        # in full precision: a bare scalar would be float32
        dtype = torch.promote_types(self.param.dtype, torch.float32)
        one = torch.ones((), dtype=dtype, device=self.param.device)
        return torch.where(self.finite, one * self.decay, one)


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
    of_weight: ClassVar[bool] = False
    """Whether its coordinates are of factors of W: a refresh looks at W and not at the gradient."""

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

        One rank does, by :meth:`balance_`; all finish the refresh alone, and find True in
        ``ctx.seen``.
        """
        return ()

    def balance_(self, state: State) -> None:  # noqa: B027
        """What a refresh does to the entries of :meth:`balanced`."""

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What coordinates refer to: state kept under one subspace is that of another if equal."""
        return type(self).__name__, self.rank

    def refreshed(self, state: State) -> Iterable[str]:
        """State keys that :meth:`refresh_`, or moments that follow it, may overwrite."""
        return list(state)

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
        """:meth:`refresh_`, asking for eigenvectors where several matrices can share a call."""
        yield from ()
        return self.refresh_(state, grad, ctx)

    @abstractmethod
    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """Shape of each coordinate, known before any gradient."""

    @abstractmethod
    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """Coordinates of ``grad (..., m, n)``, every step."""

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """:meth:`coords` of alike matrices, whose kernels may be asked for together."""
        found = []
        for state, grad in zip(states, grads, strict=True):
            found.append(self.coords(state, grad, reduce=identity))
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
        for n, own in enumerate(zip(intos, states, updates, terms, strict=True)):
            self.push_(*own)
            yield n

    def across(self, into: Target, state: State, update: dict[str, Tensor]) -> Tensor | None:
        """What :meth:`push_` must know of all columns, as sums over those that are here.

        None where a column moves by itself. The arguments are those of :meth:`push_`.
        """
        return None

    def lr_factor(self, since: int) -> float:
        """Factor of the learning rate, ``since`` steps after the last refresh."""
        return 1.0

    @property
    def by_column(self) -> bool:
        """Whether a column of the coordinates is the share of that column of the matrix."""
        return True

    def applies_grad(self, term: Term | None) -> bool:
        """Whether :meth:`push_` adds something of the gradient itself."""
        return term is not None

    def complete(self, m: int, n: int, fresh: bool) -> bool:
        """Whether all outside it is rounding, for a gradient ``(..., m, n)``.

        Args:
            m: the projected dimension.
            n: the other one.
            fresh: whether the subspace was found from this very gradient.
        """
        return False


@dataclass(frozen=True)
class Projector(Subspace):
    r"""An orthonormal basis per matrix: :math:`R = P^T G`, and :math:`R = P^T G Q` if two-sided.

    A newcomer writes one method, :meth:`find`, registers the class, and every contract test runs on
    it. Fields beyond those of this class are read from the parameter group by their name.

    Args:
        rank: number of directions r, already clamped to ``min(m, n)``.
        scale: factor of the low-rank part in the update.
        two_sided: project the columns too (``proj_type="full"``): the coordinate is ``(r, r)``.
    """

    selects: ClassVar[bool] = True
    takes_any: ClassVar[bool] = False
    """Whether :meth:`find` returns a basis, of whatever directions, for a gradient of zeros, NaN
    or Inf too, and waits for no device; if not, an accelerator replaces such a gradient by noise,
    which takes a copy of it."""

    two_sided: bool = False

    @property
    def meaning(self) -> tuple[Any, ...]:
        """A kept basis, however it was found."""
        return "basis", self.rank, self.two_sided

    @classmethod
    def from_group(cls, group: dict[str, Any], view: MatrixView) -> Self:
        """As of any subspace; ``proj_type="full"`` projects both sides."""
        return replace(super().from_group(group, view), two_sided=group["proj_type"] == "full")

    @abstractmethod
    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """A basis ``(..., m, r)`` with orthonormal columns, in ``max(float32, grad.dtype)``.

        Args:
            grad: ``(..., m, n)``, finite and not zero, in the parameter's dtype.
            previous: the basis in use ``(..., m, r)``, None at the first refresh.
            ctx: view, generator and counters.
        """

    def searching(
        self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """:meth:`find` on an accelerator, asking for eigenvectors of what is small."""
        yield from ()
        return self.find(grad, previous, ctx)

    def init(self, view: MatrixView, param: Tensor) -> State:
        """Bases of zeros: until a gradient arrives the update is zero."""
        state = {"basis": param.new_zeros(*view.batch, view.m, self.rank)}
        if self.two_sided:
            state["basis_right"] = param.new_zeros(*view.batch, view.n, self.rank)
        return state

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:
        """Bases are finite."""
        check_finite(state, "basis")
        check_finite(state, "basis_right")

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Find new bases, align their signs with the old ones, and say how they moved."""
        if ctx.fine is not None:
            return alone(self.refreshing_(state, grad, ctx))
        rotation = self._turn_(state["basis"], grad, ctx)
        right = self._turn_(state["basis_right"], grad.mT, ctx) if self.two_sided else None
        return {"low": BasisChange(rotation, right)}

    def _turn_(self, basis: Tensor, grad: Tensor, ctx: RefreshContext) -> Callable[[], Tensor]:
        old = basis.clone() if bool(basis.any()) else None
        idle = (ops.matrix_norm(grad) == 0) if ctx.view.batch else None
        if idle is not None and bool(idle.any()):  # an expert without tokens keeps its basis
            noise = torch.randn(grad.shape[-2:], generator=ctx.generator)  # or takes a random one
            grad = torch.where(idle, noise.to(grad), grad)
            new = self.find(grad, old, ctx)
            new = new if old is None else torch.where(idle, old.to(new.dtype), new)
        else:
            new = self.find(grad, old, ctx)
        basis.copy_(align_signs(new, old))  # a copy: a slice would keep the whole factor alive

        def rotation() -> Tensor:
            before = torch.zeros_like(basis) if old is None else old
            return new_to_old(basis, before)

        return rotation

    def refreshing_(
        self, state: State, grad: Tensor, ctx: RefreshContext
    ) -> Searching[dict[str, BasisChange]]:
        """On an accelerator no value is looked at: it selects what is kept."""
        fine = ctx.fine
        if fine is None or type(self).refresh_ is not Projector.refresh_:
            return self.refresh_(state, grad, ctx)
        keys = ("basis", "basis_right")[: 1 + self.two_sided]
        olds = [state[key].clone() for key in keys]
        known = usable(ops.matrix_norm(grad)) if ctx.view.batch else fine
        if not self.takes_any:
            grad = replaced(grad, known, ctx)
        found = []
        for old, x in zip(olds, (grad, grad.mT), strict=False):
            previous = None if ctx.first else old
            new = align_signs((yield from self.searching(x, previous, ctx)), previous)
            if ctx.view.batch and previous is not None:  # an expert without tokens keeps its basis
                new = torch.where(known, new, previous.to(new.dtype))
            found.append(new)
            fine = fine & (torch.linalg.vector_norm(new) < torch.inf)
        for key, new, old in zip(keys, found, olds, strict=True):
            state[key].copy_(torch.where(fine, new.to(old.dtype), old))

        def turn(n: int) -> Callable[[], Tensor] | None:
            return None if n >= len(keys) else lambda: new_to_old(state[keys[n]], olds[n])

        return {"low": BasisChange(turn(0), turn(1), ok=fine)}

    @property
    def by_column(self) -> bool:
        """Not of both sides: their columns are those of the other basis."""
        return not self.two_sided

    def complete(self, m: int, n: int, fresh: bool) -> bool:
        """At full rank: of the space, or of the gradient that the basis was fitted to."""
        if self.fitted and fresh and self.rank >= min(m, n):
            return True
        return self.rank >= m and (not self.two_sided or self.rank >= n)

    def bases(self, state: State, view: MatrixView) -> list[Tensor]:
        """As kept."""
        return [state[key] for key in ("basis", "basis_right") if key in state]

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """One coordinate, ``low``: ``(..., r, n)``, or ``(..., r, r)`` if two-sided."""
        return {"low": (*view.batch, self.rank, self.rank if self.two_sided else view.n)}

    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """``P^T G (..., r, n)``, or ``P^T G Q (..., r, r)``."""
        (found,) = self.coords_of([state], [grad])
        return {name: reduce(low) for name, low in found.items()}

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; those of several lie one after the other in memory."""
        outs: Sequence[Tensor | None] = [None] * len(grads)
        if len(grads) > 1 and grads[0].dim() == 2:
            outs = empty_like_all(grads, (self.rank, grads[0].shape[1]), grads[0].dtype)
        found = []
        for state, grad, out in zip(states, grads, outs, strict=True):
            low = ops.project(state["basis"], grad, out)
            if self.two_sided:
                low = low @ state["basis_right"].to(low.dtype)
            found.append({"low": low})
        return found

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """``W <- decay W - lr (scale P N (Q^T) + term)``: no full-size temporary."""
        deque(self.push_all_([into], [state], [update], [term]), maxlen=0)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each; what decays the weights is one kernel."""
        plain = [n for n, term in enumerate(terms) if term is None]
        decays = dict(zip(plain, decayed_([intos[n] for n in plain]), strict=True))
        for n, (into, state, update, term) in enumerate(
            zip(intos, states, updates, terms, strict=True)
        ):
            if term is None:
                right = state["basis_right"] if self.two_sided else None
                alpha = -into.lr * self.scale
                ops.lift_add_(
                    into.param, state["basis"], update["low"], right, decays[n], alpha,
                    into.rounding,
                )  # fmt: skip
            else:
                self._push_term_(into, state, update, term)
            yield n

    def _push_term_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term
    ) -> None:
        right = state["basis_right"] if self.two_sided else None
        assert into.low is not None
        wide, low = update["low"], into.low
        if right is not None:
            wide, low = (x @ right.mT.to(x.dtype) for x in (wide, low))
        scale = self.scale
        if term.kind not in KINDS:
            raise unknown_kind(term.kind, KINDS)
        if term.kind == "raw":  # of the whole projection, whatever the scale
            wider = torch.promote_types(low.dtype, torch.float32)
            ones = torch.ones_like(low[..., :1, :], dtype=wider)
            term = Term("scaled", ones * term.gain)
            wide, scale = (wide, 1.0) if scale == 1 else (wide * scale, 1.0)
        rounds = into.rounding is not None
        if rounds or isinstance(term.gain, Tensor) or isinstance(into.decay, Tensor):
            ops.lift_add_term_(
                into.param, into.grad, state["basis"], wide, low, term.columns, term.gain,
                into.decay, into.lr, scale, into.rounding, into.finite,
            )  # fmt: skip
            return
        finite = [] if into.finite is None else [into.finite]
        common = [into.param], [into.grad], [state["basis"]], [wide], [low]
        if term.kind == "scaled":
            assert term.columns is not None
            columns = [term.columns]
            ops.lift_add_scaled_(*common, columns, into.decay, into.lr, scale, finite)
        else:  # "sign"
            ops.lift_add_sign_(*common, into.decay, into.lr, scale, term.gain, finite)


def usable(norm: Tensor) -> Tensor:
    """Whether norms are neither 0 nor Inf nor NaN, on their device."""
    return norm / norm == 1


def replaced(grad: Tensor, known: Tensor, ctx: RefreshContext) -> Tensor:
    """The gradient where it is ``known`` to be usable, else noise, drawn where the gradient is."""
    generator = ctx.generator
    if not grad.is_cpu and not isinstance(grad, FakeTensor):
        generator = torch.Generator(grad.device).manual_seed(generator.initial_seed())
    noise = torch.empty(grad.shape[-2:], dtype=grad.dtype, device=grad.device)
    return torch.where(known, grad, noise.normal_(generator=generator))


def decayed_(intos: Sequence[Target]) -> list[float | Tensor]:
    """Let those decay, all at once, whose flags are on the device; what is left to the others.

    A GEMM takes a factor of its own from the host alone, and a flag not at all.
    """
    left = [into.decay for into in intos]
    here = [
        n
        for n, into in enumerate(intos)
        if into.finite is not None and into.rounding is None and _is_one(into.decay)
    ]
    by_decay: dict[Any, list[int]] = {}
    for n in here:
        decay = intos[n].decay
        by_decay.setdefault(id(decay) if isinstance(decay, Tensor) else decay, []).append(n)
    for at in by_decay.values():
        decay = intos[at[0]].decay
        finite = [intos[n].finite for n in at]
        params = [intos[n].param for n in at]
        if isinstance(decay, Tensor):
            wide = torch.promote_types(params[0].dtype, torch.float32)
            factor = decay.reshape(()).to(params[0].device, wide, non_blocking=True)
            ops.decay_(params, 1.0, [factor] * len(at), finite)  # type: ignore[arg-type]
        else:
            ops.decay_(params, decay, [], finite)  # type: ignore[arg-type]
        for n in at:
            left[n] = 1.0
    for n, into in enumerate(intos):
        if n not in here:
            left[n] = into.guarded_decay()
    return left


def _is_one(decay: float | Tensor) -> bool:
    """Whether it is one factor for all of a matrix, and not one for each expert."""
    return not isinstance(decay, Tensor) or decay.numel() == 1


def new_to_old(new: Tensor, old: Tensor) -> Tensor:
    """``P_new^T P_old (..., r, r)`` in at least float32."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    return new.to(dtype).mT @ old.to(dtype)


def align_signs(basis: Tensor, previous: Tensor | None) -> Tensor:
    """``basis (..., m, r)`` with each column's sign fixed by the old column, else by its peak.

    Singular vectors have arbitrary signs: they depend on the driver, the layout and the number of
    ranks, and a flip under carried moments changes the run (71 % after 8 steps when one vector is
    negated). A column nearly orthogonal to its predecessor takes the sign that makes its largest
    entry positive, as every column of a first basis does.
    """
    peak = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    if previous is not None:
        cosine = (basis * previous.to(basis.dtype)).sum(-2, keepdim=True)
        peak = torch.where(cosine.abs() > 1e-3, cosine, peak)
    return torch.where(peak < 0, -basis, basis)


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
    return matrix_view(shape, side, group.get("flatten", False))
