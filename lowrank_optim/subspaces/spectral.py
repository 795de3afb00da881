"""Spectral factors of the weights themselves: the subspace of Sparse Spectral Training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.factors import stepped
from lowrank_optim.subspaces.refresh import Reduce, identity
from lowrank_optim.subspaces.spectral_factors import FACTORS, SpectralFactors
from lowrank_optim.subspaces.target import Target, guarded
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
        u, v = state["basis_u"], state["basis_v"]
        gu, gv = ops.project(v.mT, grad.mT), ops.project(u.mT, grad)
        return {name: reduce(x) for name, x in self._chained(state, grad, gu, gv).items()}

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; all but the products with gradients are computed of several as one."""
        if type(self).coords is not Spectral.coords:
            return super().coords_of(states, grads)
        found: list[dict[str, Tensor]] = []
        for at in self._several(states, grads[0]):
            if len(at) == 1:
                found.append(self.coords(states[at[0]], grads[at[0]], reduce=identity))
                continue
            whole = _whole([states[n] for n in at])
            u, v = (whole[key].to(grads[0].dtype).unbind(0) for key in ("basis_u", "basis_v"))
            own = [grads[n] for n in at]
            dtype = ops.product_dtype(own[0].dtype)
            gu, gv = (torch.empty_like(whole[key], dtype=dtype) for key in FACTORS[:2])
            for g, a, b, of_u, of_v in zip(own, u, v, gu.unbind(0), gv.unbind(0), strict=True):
                ops.project(b.mT, g.mT, of_u)
                ops.project(a.mT, g, of_v)
            parts = self._chained(whole, own[0], gu, gv)
            each = zip(*(x.unbind(0) for x in parts.values()), strict=True)
            found += [dict(zip(parts, xs, strict=True)) for xs in each]
        return found

    def _several(self, states: Sequence[State], like: Tensor) -> list[range]:
        """Which matrices like ``like`` are computed as one."""
        size = sum(states[0][key].numel() for key in FACTORS[:2])
        if self.exact:  # whose other vectors come some at a time
            return [range(n, n + 1) for n in range(len(states))]
        return fillings(len(states), 2 * size, like)  # of what moves W each factor is half

    def _chained(self, state: State, grad: Tensor, gu: Tensor, gv: Tensor) -> dict[str, Tensor]:
        """Gradients of factors, from the products of the gradient with v and with u."""
        u = state["basis_u"]
        gs = (gu.to(u.dtype) * u).sum(-1)
        if self.exact:
            parts, index = [gs], [self._active(state)]
            for where, ui, vi in self.rest(state):
                parts.append((ops.project(vi.mT, grad.mT).to(ui.dtype) * ui).sum(-1))
                index.append(where)
            gs = torch.empty_like(state["basis_s"]).scatter_(
                -1, torch.cat(index, -1), torch.cat(parts, -1)
            )
        if not self.enhanced:
            s = self.spectrum(state).unsqueeze(-1).to(gu.dtype)
            gu, gv = gu * s, gv * s
        return {"u": gu, "s": gs.unsqueeze(-2), "v": gv}

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
        torch._foreach_copy_([state[key] for key in FACTORS], [*change[:3]])
        if change.sign is not None:
            self._flip_rest_(state, change.sign)

    def _of_active(self, state: State, values: Tensor) -> Tensor:
        """Entries ``(..., r, 1)`` of ``(..., k)`` that belong to the vectors in use."""
        values = values.gather(-1, self._active(state)) if self.exact else values
        return values.unsqueeze(-1)

    def _flip_rest_(self, state: State, sign: Tensor) -> None:
        if self.exact:
            rest = state[self.rest_keys[0]]
            own = sign.gather(-1, state["basis_order"][..., self.rank :].long())
            rest.mul_(own.unsqueeze(-1).to(rest))

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        r"""``W <- decay W + U' diag(s') V'^T - U diag(decay s) V^T``, rounded once.

        The difference is taken of the factors, not of the products: a step of zero is no step.
        """
        old_u, decay = state["basis_u"], into.guarded_decay()
        change = self.advanced(state, update, into.lr, of_all(decay), into.across)
        lefts, rights = ([x] for x in _moves(old_u, change))
        for where, u, v in self.rest(state):
            lefts.append(u)
            rights.append(v * change.gained.gather(-1, where).unsqueeze(-1))
        if into.param.dtype != old_u.dtype:
            lefts, rights = [torch.cat(lefts, -2)], [torch.cat(rights, -2)]
        for left, right in zip(lefts, rights, strict=True):
            ops.lift_add_(into.param, left.mT, right, None, decay, 1.0, into.rounding)
            decay = 1.0
        self.keep_(state, change)

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
            own = [intos[n] for n in at]
            if len(at) == 1:
                self.push_(own[0], states[at[0]], updates[at[0]], terms[at[0]])
                yield at[0]
                continue
            whole = _whole([states[n] for n in at])
            update = {key: stacked([updates[n][key] for n in at]) for key in updates[0]}
            decays = [into.guarded_decay() for into in guarded(own)]
            decay = decays[0]
            if isinstance(decay, Tensor):
                decay = stacked(decays).reshape(len(at), -1)[:, :1]  # type: ignore[arg-type]
            change = self.advanced(whole, update, first.lr, decay)
            left, right = _moves(whole["basis_u"], change)
            if first.rounding is None:
                left, right = left.to(first.param.dtype), right.to(first.param.dtype)
            parts = [[None] * len(at) if x is None else x.unbind(0) for x in change]
            lifts = zip(left.unbind(0), right.unbind(0), zip(*parts, strict=True), strict=True)
            for n, (own_left, own_right, moved) in zip(at, lifts, strict=True):
                into, scale = intos[n], decays[n - at[0]]
                ops.lift_add_(into.param, own_left.mT, own_right, None, scale, 1.0, into.rounding)
                self.keep_(states[n], Change(*moved))
                yield n


def of_all(decay: float | Tensor) -> float | Tensor:
    """A decay that all singular values of a matrix, and of its experts, have in common."""
    return decay.reshape(-1)[:1] if isinstance(decay, Tensor) else decay


def _whole(states: Sequence[State]) -> State:
    """Factors of several matrices, as those of a batch."""
    return {key: stacked([state[key] for state in states]) for key in FACTORS}


def _moves(old_u: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """Rows a and b of ``sum a b^T``, by which W moves."""
    left = torch.cat([change.turned, old_u], -2)
    return left, torch.cat([change.after, change.after - change.before], -2)
