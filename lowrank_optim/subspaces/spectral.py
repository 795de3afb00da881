"""Spectral factors of the weights themselves: the subspace of Sparse Spectral Training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.stacked import cast_all, empty_like_all, stacked
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.factors import stepped
from lowrank_optim.subspaces.refresh import Reduce
from lowrank_optim.subspaces.spectral_factors import FACTORS, SpectralFactors
from lowrank_optim.subspaces.target import Target, decayed_, guarded
from lowrank_optim.subspaces.terms import Term


class Change(NamedTuple):
    """What one step does to the factors, which it has not touched yet."""

    u: Tensor
    """The active u of the next step ``(..., r, m)``."""
    v: Tensor
    """The active v ``(..., r, n)``."""
    s: Tensor
    """All singular values ``(..., k)``."""
    sign: Tensor | None
    """Of each, where ``negative="flip"`` turns some u around, in use or not."""

    turned: Tensor
    """Change of the active u ``(..., r, m)``."""
    before: Tensor
    """``decay s v`` of the active, ``(..., r, n)``."""
    after: Tensor
    """``s' v'`` of the active, ``(..., r, n)``."""
    gained: Tensor
    """``s' - decay s`` of all ``(..., k)``, with the sign that u keeps."""

    def each(self, count: int) -> list[Change]:
        """Those of ``count`` matrices that were computed as one."""
        parts = [[None] * count if x is None else x.unbind(0) for x in self]
        return [Change(*own) for own in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Spectral(SpectralFactors):
    r"""Singular values of W, and r of its singular vectors at a time.

    .. math::
        W = U \mathrm{diag}(s) V^T, \qquad
        g_{u_i} = G v_i, \quad g_{v_i} = G^T u_i, \quad g_{s_i} = u_i^T G v_i

    Coordinates ``u (..., r, m)`` and ``v (..., r, n)`` of the vectors in use, and ``s (..., 1, k)``
    of all singular values, ``(..., 1, r)`` with ``factors="active"``. A refresh begins an
    iteration: it draws r other vectors, and after ``iterations_per_round`` of them factors W anew.
    """

    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """Gradients of the factors, by the chain rule; ``enhanced`` leaves out the factor s."""
        (found,) = self._found([state], [grad])
        return {name: reduce(x) for name, x in found.items()}

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; all but the products with gradients are computed of several as one."""
        if type(self).coords is not Spectral.coords:
            return super().coords_of(states, grads)
        found: list[dict[str, Tensor]] = []
        for at in self._several(states, grads[0]):
            found += self._found([states[n] for n in at], [grads[n] for n in at])
        return found

    def _several(self, states: Sequence[State], like: Tensor) -> list[range]:
        """Which matrices like ``like`` are computed as one."""
        size = sum(states[0][key].numel() for key in FACTORS[:2])
        if self.exact:  # what the other vectors move W by
            size += sum(states[0][key].numel() for key in self.rest_keys)
        return fillings(len(states), 2 * size, like)  # of what moves W each factor is half

    def _found(self, states: Sequence[State], grads: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Coordinates of matrices that are computed as one."""
        whole, turned = _whole(states), [grad.mT for grad in grads]
        u, gu = whole["basis_u"], _products(whole["basis_v"].unbind(0), turned)
        gv = _products(u.unbind(0), grads)
        gs = (gu.to(u.dtype) * u).sum(-1)
        if self.exact:
            parts, index = [gs], [self._active(whole)]
            for where, us, vs in self.rest(states):
                parts.append((_products(vs, turned).to(u.dtype) * stacked(us)).sum(-1))
                index.append(where)
            gs = torch.empty_like(whole["basis_s"]).scatter_(
                -1, torch.cat(index, -1), torch.cat(parts, -1)
            )
        if not self.enhanced:
            s = self.spectrum(whole).unsqueeze(-1).to(gu.dtype)
            gu, gv = gu * s, gv * s
        each = zip(gu.unbind(0), gs.unsqueeze(-2).unbind(0), gv.unbind(0), strict=True)
        return [{"u": own_u, "s": own_s, "v": own_v} for own_u, own_s, own_v in each]

    def across(self, into: Target, state: State, update: dict[str, Tensor]) -> Tensor:
        """Of each v, once it has moved: the square of its length, and whether it has moved."""
        v = state["basis_v"]
        step = update["v"].to(v.dtype) * (into.lr * self.vector_lr_scale)
        return torch.stack([(v - step).double().square().sum(-1), (step != 0).any(-1).double()])

    def advanced(
        self,
        state: State,
        update: dict[str, Tensor],
        lr: float,
        decay: float | Tensor,
        across: Tensor | None = None,
    ) -> Change:
        """A step of the factors: unit vectors, singular values not below zero, decay on s alone.

        ``decay`` is a number, or of a shape that goes with the singular values.
        """
        u, v, s = (state[key] for key in FACTORS)
        decayed = s * decay
        new_s = decayed - (lr * self.s_lr_scale) * update["s"].squeeze(-2)
        sign = torch.where(new_s < 0, -1.0, 1.0).to(s) if self.negative == "flip" else None
        before = self._of_active(state, decayed) * v
        new_u = stepped(u, update["u"], lr * self.vector_lr_scale)
        new_v = stepped(v, update["v"], lr * self.vector_lr_scale, across)
        gained = new_s - decayed if sign is not None else new_s.clamp(min=0) - decayed
        after = self._of_active(state, decayed + gained) * new_v
        turned = new_u - u
        if sign is not None:
            new_s, new_u = new_s.abs(), new_u * self._of_active(state, sign)
        return Change(new_u, new_v, new_s.clamp(min=0), sign, turned, before, after, gained)

    def pushed(self, state: State) -> Iterable[str]:
        """The factors in use; of those that are not, u where it may turn around."""
        turned = self.rest_keys[:1] if self.exact and self.negative == "flip" else ()
        return ["basis_u", "basis_v", "basis_s", *turned]

    def keep_(self, state: State, change: Change) -> None:
        """Write what :meth:`advanced` found."""
        self._keep_all_([state], [change])

    def _keep_all_(self, states: Sequence[State], changes: Sequence[Change]) -> None:
        olds = [state[key] for state in states for key in FACTORS]
        torch._foreach_copy_(olds, [x for change in changes for x in change[:3]])
        for state, change in zip(states, changes, strict=True) if self.exact else ():
            if change.sign is not None:  # u may turn around where it is not in use too
                rest = state[self.rest_keys[0]]
                own = change.sign.gather(-1, state["basis_order"][..., self.rank :].long())
                rest.mul_(own.unsqueeze(-1).to(rest))

    def _of_active(self, state: State, values: Tensor) -> Tensor:
        """Entries ``(..., r, 1)`` of ``(..., k)`` that belong to the vectors in use."""
        values = values.gather(-1, self._active(state)) if self.exact else values
        return values.unsqueeze(-1)

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        r"""``W <- decay W + U' diag(s') V'^T - U diag(decay s) V^T``, rounded once.

        The difference is taken of the factors, not of the products: a step of zero is no step.
        """
        decay = into.guarded_decay()
        deque(self._push_([into], [state], [update], [decay], of_all(decay)), maxlen=0)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each; factors of several are stepped as one tensor."""
        first, plain = intos[0], type(self).push_ is Spectral.push_
        alike = all(into.lr == first.lr and into.across is None for into in intos)
        if not (plain and alike):
            yield from super().push_all_(intos, states, updates, terms)
            return
        for at in self._several(states, first.param):
            if len(at) == 1:
                self.push_(intos[at[0]], states[at[0]], updates[at[0]], terms[at[0]])
                yield at[0]
                continue
            own = [intos[n] for n in at]
            decays = [into.guarded_decay() for into in guarded(own)]
            of_s = decays[0]
            if isinstance(of_s, Tensor):
                of_s = stacked(decays).reshape(len(at), -1)[:, :1]  # type: ignore[arg-type]
            lists = [states[n] for n in at], [updates[n] for n in at]
            for n in self._push_(own, *lists, decayed_(own), of_s):
                yield at[n]

    def _push_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        decays: Sequence[float | Tensor],
        of_s: float | Tensor,
    ) -> Iterator[int]:
        """:meth:`push_` of matrices that are computed as one.

        Args:
            intos: alike but for the weights.
            states: of each.
            updates: of each.
            decays: what is left to multiply the weights of each by.
            of_s: what the singular values decay by.
        """
        first, whole = intos[0], _whole(states)
        update = {key: stacked([own[key] for own in updates]) for key in updates[0]}
        across = None if first.across is None else first.across.unsqueeze(1)
        change = self.advanced(whole, update, first.lr, of_s, across)
        moves = [_moves(whole["basis_u"], change)]
        for where, us, vs in self.rest(states):
            gained = change.gained.gather(-1, where).unsqueeze(-1)
            moves.append((stacked(us), stacked(vs) * gained))
        lefts, rights = ([*own] for own in zip(*moves, strict=True))
        if first.param.dtype != whole["basis_u"].dtype:  # rounded once
            lefts, rights = [torch.cat(lefts, -2)], [torch.cat(rights, -2)]
            if first.rounding is None:
                lefts, rights = ([x.to(first.param.dtype) for x in own] for own in (lefts, rights))
        changes, count = change.each(len(states)), 0
        try:
            for n, (into, decay) in enumerate(zip(intos, decays, strict=True)):
                for left, right in zip(lefts, rights, strict=True):
                    own = left[n].mT, right[n], None
                    ops.lift_add_(into.param, *own, decay, 1.0, into.rounding)
                    decay = 1.0
                count = n + 1
                yield n
        finally:  # if another could not be written too
            if count:
                self._keep_all_(states[:count], changes[:count])


def of_all(decay: float | Tensor) -> float | Tensor:
    """A decay that all singular values of a matrix, and of its experts, have in common."""
    return decay.reshape(-1)[:1] if isinstance(decay, Tensor) else decay


def _whole(states: Sequence[State]) -> State:
    """Factors of several matrices, as those of a batch, and the order of theirs that have one."""
    keys = [key for key in (*FACTORS, "basis_order") if key in states[0]]
    return {key: stacked([state[key] for state in states]) for key in keys}


def _products(lefts: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Some vectors ``(..., c, m)`` of each matrix times its gradient, ``(b, ..., c, n)``."""
    if len(grads) == 1:
        return ops.project(lefts[0].mT, grads[0]).unsqueeze(0)
    dtype = ops.product_dtype(grads[0].dtype)
    narrow = cast_all(lefts, grads[0].dtype)
    outs = empty_like_all(lefts, (lefts[0].shape[-2], grads[0].shape[-1]), dtype)
    for left, grad, out in zip(narrow, grads, outs, strict=True):
        ops.project(left.mT, grad, out)
    return stacked(outs)


def _moves(old_u: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """Rows a and b of ``sum a b^T``, by which W moves."""
    left = torch.cat([change.turned, old_u], -2)
    return left, torch.cat([change.after, change.after - change.before], -2)
