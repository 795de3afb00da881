"""An orthonormal basis that is kept: what projectors of that kind have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowrank_optim import ops
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.numbers import is_number, number_of
from lowrank_optim.ops.stacked import cast_all, empty_like_all
from lowrank_optim.subspaces.base import State, Subspace
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching, alone, beside
from lowrank_optim.subspaces.target import Target, gains_of, lift_all_, of_kernels
from lowrank_optim.subspaces.terms import KINDS, Term, unknown_kind
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_finite


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
    takes_wide: ClassVar[bool] = True
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
        """:meth:`find` on an accelerator, asking for what several matrices can share."""
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
            size, draws = grad.shape[-2:], ctx.generator  # or takes a random one
            noise = torch.randn(size, dtype=torch.float32, generator=draws)
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
        sides = zip(olds, (grad, grad.mT), strict=False)
        found = yield from beside([self._sought(x, old, known, ctx) for old, x in sides])
        for new in found:
            fine = fine & (torch.linalg.vector_norm(new) < torch.inf)
        for key, new, old in zip(keys, found, olds, strict=True):
            state[key].copy_(torch.where(fine, new.to(old.dtype), old))

        def turn(n: int) -> Callable[[], Tensor] | None:
            return None if n >= len(keys) else lambda: new_to_old(state[keys[n]], olds[n])

        return {"low": BasisChange(turn(0), turn(1), ok=fine)}

    def _sought(
        self, grad: Tensor, old: Tensor, known: Tensor, ctx: RefreshContext
    ) -> Searching[Tensor]:
        """The new basis of one side; the old one of experts of which nothing is known."""
        previous = None if ctx.first else old
        new = yield from self.searching(grad, previous, ctx)
        signs = (new,) if previous is None else (new, previous)
        new = yield Ask(align_signs, signs)
        if ctx.view.batch and previous is not None:  # an expert without tokens keeps its basis
            new = torch.where(known, new, previous.to(new.dtype))
        return new

    @property
    def by_column(self) -> bool:
        """Not of both sides: their columns are those of the other basis."""
        return not self.two_sided

    def complete(self, m: int, n: int, fresh: int | None) -> bool:
        """At full rank: of the space, or of the gradient that the basis was fitted to."""
        if fresh is not None and self.spans(fresh) and self.rank >= min(m, n):
            return True
        return self.rank >= m and (not self.two_sided or self.rank >= n)

    def bases(self, state: State, view: MatrixView) -> list[Tensor]:
        """As kept."""
        return [state[key] for key in ("basis", "basis_right") if key in state]

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """One coordinate, ``low``: ``(..., r, n)``, or ``(..., r, r)`` if two-sided."""
        return {"low": (*view.batch, self.rank, self.rank if self.two_sided else view.n)}

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """``P^T G (..., r, n)``, or ``P^T G Q (..., r, r)``."""
        (found,) = self.coords_of([state], [grad])
        return found

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; those of several lie one after the other in memory."""
        outs: Sequence[Tensor | None] = [None] * len(grads)
        if len(grads) > 1 and grads[0].dim() == 2:
            dtype = ops.product_dtype(grads[0].dtype)
            outs = empty_like_all(grads, (self.rank, grads[0].shape[1]), dtype)
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
        """As of each; weights decay in their products, or all in one kernel before."""
        plain = [n for n, term in enumerate(terms) if term is None]
        bases, lows = [state["basis"] for state in states], [own["low"] for own in updates]
        dtype = intos[0].param.dtype
        if on_accelerator(intos[0].param):  # a product has one format
            bases = cast_all(bases, dtype)
            lows = cast_all(lows, dtype) if len(plain) == len(intos) else lows
        terms = _with_columns(intos, terms)
        if plain:
            others = [states[n]["basis_right"] if self.two_sided else None for n in plain]
            alphas = [-intos[n].lr * self.scale for n in plain]
            own, low = [intos[n] for n in plain], [lows[n] for n in plain]
            for n in lift_all_(own, [bases[n] for n in plain], low, others, alphas):
                yield plain[n]
        rights = [state["basis_right"] for state in states] if self.two_sided else []
        yield from self._push_terms_(intos, bases, rights, updates, terms)

    def takes_step(self, param: Tensor, term: Term | None) -> bool:
        """What has a term, in the ops that lift and add it; else where products read factors."""
        return ops.reads_factors(param) if term is None else is_number(term.gain)

    def _push_terms_(
        self,
        intos: Sequence[Target],
        bases: Sequence[Tensor],
        rights: Sequence[Tensor],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """Updates with a term: those with the same numbers are one call of an op."""
        fused: dict[Any, list[tuple[int, Target, Term, list[Tensor]]]] = {}
        for n, (into, basis, term) in enumerate(zip(intos, bases, terms, strict=True)):
            if term is None:
                continue
            assert into.low is not None
            wide, low = updates[n]["low"], into.low
            if rights:
                wide, low = (x @ rights[n].mT.to(x.dtype) for x in (wide, low))
            scale = self.scale
            if term.kind not in KINDS:
                raise unknown_kind(term.kind, KINDS)
            if term.kind == "raw":  # of the whole projection, whatever the scale
                assert term.columns is not None
                term = Term("scaled", term.columns)
                wide, scale = (wide, 1.0) if scale == 1 else (wide * scale, 1.0)
            if scale == 0 and term.kind == "scaled":  # nothing is lifted: no directions
                basis, wide, low = basis[..., :0], wide[..., :0, :], low[..., :0, :]
            rounds = into.rounding is not None
            if rounds or not (is_number(term.gain) and is_number(into.decay)):
                assert into.step is None  # as takes_step has it
                ops.lift_add_term_(
                    into.param, into.grad, basis, wide, low, term.columns, term.gain,
                    into.decay, into.lr, scale, into.rounding, into.finite,
                )  # fmt: skip
                yield n
                continue
            operands = [into.param, into.grad, basis, wide, low]
            if term.kind == "scaled":
                assert term.columns is not None
                operands.append(term.columns)
            gain = number_of(term.gain), isinstance(term.gain, Tensor)
            key = term.kind, into.numbers, into.read, scale, gain
            fused.setdefault(key, []).append((n, into, term, operands))
        for (kind, (decay, lr), _, scale, (gain, _)), own in fused.items():
            at, some, alike, operands_of = zip(*own, strict=True)
            params, grads, own_bases, wides, lows, *columns = zip(*operands_of, strict=True)
            lists, more = (params, grads, own_bases, wides, lows), of_kernels(some)
            if kind == "scaled":
                ops.lift_add_scaled_(*lists, columns[0], decay, lr, scale, *more)
            else:  # "sign"
                gains = gains_of(alike, params[0])
                ops.lift_add_sign_(*lists, decay, lr, scale, gain, *more, gains)
            yield from at


def _with_columns(intos: Sequence[Target], terms: Sequence[Term | None]) -> list[Term | None]:
    """Raw terms by a factor for each column, as kernels take them; one for all that are alike."""
    known: dict[Any, Tensor] = {}
    found: list[Term | None] = []
    for into, term in zip(intos, terms, strict=True):
        if term is not None and term.kind == "raw":
            assert into.low is not None
            gain, (*batch, _, n) = term.gain, into.param.shape
            key = (id(gain) if isinstance(gain, Tensor) else gain, into.param.shape, into.low.dtype)
            if key not in known:
                wider = torch.promote_types(into.low.dtype, torch.float32)
                one = torch.ones((), dtype=wider, device=into.param.device)
                known[key] = (one * gain).to(wider).expand(*batch, 1, n)
            term = term._replace(columns=known[key])
        found.append(term)
    return found


def usable(norm: Tensor) -> Tensor:
    """Whether norms are neither 0 nor Inf nor NaN, on their device."""
    return norm / norm == 1


def replaced(grad: Tensor, known: Tensor, ctx: RefreshContext) -> Tensor:
    """The gradient where it is ``known`` to be usable, else noise, drawn where the gradient is."""
    # a generator of its own: what a search draws is what a host's draws, which replaces nothing
    noise = drawn_there(grad, grad.shape[-2:], ctx.generator.initial_seed())
    return torch.where(known, grad, noise)


def drawn_there(like: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Normal numbers of ``shape``, drawn where ``like`` is: others on another kind of device."""
    host = like.is_cpu or like.is_meta or isinstance(like, FakeTensor)
    generator = torch.Generator("cpu" if host else like.device).manual_seed(seed)
    noise = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return noise.normal_(generator=generator)


def new_to_old(new: Tensor, old: Tensor) -> Tensor:
    """``P_new^T P_old (..., r, r)`` in at least float32."""
    dtype = torch.promote_types(new.dtype, torch.float32)
    return new.to(dtype).mT @ old.to(dtype)


def align_signs(basis: Tensor, previous: Tensor | None = None) -> Tensor:
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
