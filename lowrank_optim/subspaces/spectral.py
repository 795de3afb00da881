"""Spectral factors of the weights themselves: the subspace of Sparse Spectral Training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.devices import sent
from lowrank_optim.ops.stacked import cast_all, empty_like_all, over_all, stacked
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.spectral_factors import FACTORS, SpectralFactors
from lowrank_optim.subspaces.target import Target, guarded, lift_all_
from lowrank_optim.subspaces.terms import Term


class Values(NamedTuple):
    """What one step does to the singular values of b matrices, which it has not touched yet."""

    new: Tensor
    """All of them ``(b, ..., k)``."""
    sign: Tensor | None
    """Of each, where ``negative="flip"`` turns some u around, in use or not."""
    gained: Tensor
    """``s' - decay s`` of all ``(b, ..., k)``, with the sign that u keeps."""
    lengths: Tensor
    """``s'``, with that sign, and ``decay s`` of the vectors in use ``(b, 2, ..., r)``."""

    def of(self, at: range) -> Values:
        """Those of some of the matrices."""
        own = slice(at.start, at.stop)
        sign = None if self.sign is None else self.sign[own]
        return Values(self.new[own], sign, self.gained[own], self.lengths[own])


class Vectors(NamedTuple):
    """The vectors in use of one side of b matrices after a step."""

    new: Sequence[Tensor]
    """``(..., r, n)`` of each; none where they lie in the place of the old ones."""
    moves: list[Tensor]
    """Rows by whose products W moves ``(..., 2 r, n)`` of each, where somebody asked."""


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

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """Gradients of the factors, by the chain rule; ``enhanced`` leaves out the factor s."""
        (found,) = self._found([state], [grad])
        return found

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
        us, vs = ([state[key] for state in states] for key in FACTORS[:2])
        turned = [grad.mT for grad in grads]
        gu, gv = _products(vs, turned), _products(us, grads)
        gs = stacked(ops.row_dots(gu.unbind(0), us))
        if self.exact:
            parts, index = [gs], [self._active(_small(states))]
            for where, rest_u, rest_v in self.rest(states):
                found = _products(rest_v, turned).unbind(0)
                parts.append(stacked(ops.row_dots(found, rest_u)))
                index.append(where)
            every = gs.new_empty(len(states), *states[0]["basis_s"].shape)
            gs = every.scatter_(-1, torch.cat(index, -1), torch.cat(parts, -1))
        if not self.enhanced:
            s = self.spectrum(_small(states)).unsqueeze(-1).to(gu.dtype)
            gu, gv = gu * s, gv * s
        each = zip(gu.unbind(0), gs.unsqueeze(-2).unbind(0), gv.unbind(0), strict=True)
        return [{"u": own_u, "s": own_s, "v": own_v} for own_u, own_s, own_v in each]

    def across(self, into: Target, state: State, update: dict[str, Tensor]) -> Tensor:
        """Of each v, once it has moved: the square of its length, and whether it has moved."""
        v = state["basis_v"]
        step = update["v"].to(v.dtype) * (into.lr * self.vector_lr_scale)
        return torch.stack([(v - step).double().square().sum(-1), (step != 0).any(-1).double()])

    def values(
        self,
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        lr: float,
        decay: float | Tensor,
    ) -> Values:
        """A step of singular values, none of which falls below zero.

        Args:
            states: of each matrix.
            updates: of each.
            lr: how far.
            decay: a number, or of a shape that goes with ``(b, ..., k)``.
        """
        small = _small(states)
        steps = stacked([update["s"] for update in updates]).squeeze(-2)
        if isinstance(decay, Tensor):  # in float64, as a step size of the device, it would widen s
            decay = decay.to(small["basis_s"].dtype)
        decayed = small["basis_s"] * decay
        new = decayed - (lr * self.s_lr_scale) * steps
        sign = None
        if self.negative == "flip":
            sign, gained, new = torch.where(new < 0, -1.0, 1.0).to(new), new - decayed, new.abs()
        else:
            new = new.clamp(min=0)
            gained = new - decayed
        lengths = [self._of_active(small, x) for x in (decayed + gained, decayed)]
        return Values(new, sign, gained, torch.stack(lengths, 1))

    def vectors(
        self,
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        lr: float,
        values: Values,
        moved: torch.dtype | None,
        across: Tensor | None = None,
    ) -> tuple[Vectors, Vectors]:
        """A step of u and v in use, which are unit vectors after it.

        Args:
            states: of each matrix.
            updates: of each.
            lr: how far.
            values: of each.
            moved: format of what W moves by; None for none.
            across: as of :class:`Target`.
        """
        sides = []
        for side, lengths, parts in (
            ("u", [], []),
            ("v", values.lengths.unbind(0), [] if across is None else [across]),
        ):
            xs = [state[f"basis_{side}"] for state in states]
            *batch, rank, size = xs[0].shape
            moves: list[Tensor] = []
            if moved is None:
                new: Sequence[Tensor] = empty_like_all(xs, xs[0].shape, xs[0].dtype)
            else:
                new = over_all(xs)
                moves = empty_like_all(xs, (*batch, 2 * rank, size), moved)
            steps = [update[side] for update in updates]
            ops.turn_rows_(xs, steps, lengths, parts, new, moves, lr * self.vector_lr_scale)
            if side == "u" and values.sign is not None:
                signs = self._of_active(_small(states), values.sign).unsqueeze(-1)
                torch._foreach_mul_([*new], [*signs.unbind(0)])
            sides.append(Vectors([] if new is xs else new, moves))
        return sides[0], sides[1]

    def pushed(self, state: State) -> Iterable[str]:
        """The factors in use; of those that are not, u where it may turn around."""
        turned = self.rest_keys[:1] if self.exact and self.negative == "flip" else ()
        return ["basis_u", "basis_v", "basis_s", *turned]

    def keep_(
        self, states: Sequence[State], sides: tuple[Vectors, Vectors], values: Values
    ) -> None:
        """Write what :meth:`vectors` and :meth:`values` found, of the first of the matrices."""
        lists = sides[0].new, sides[1].new, values.new.unbind(0)
        pairs = [
            (state[key], new)
            for key, own in zip(FACTORS, lists, strict=True)
            for state, new in zip(states, own, strict=False)
        ]
        olds, news = zip(*pairs, strict=True)
        torch._foreach_copy_(olds, news)
        if values.sign is not None and self.exact:  # u may turn around where it is not in use too
            for state, sign in zip(states, values.sign, strict=False):
                rest = state[self.rest_keys[0]]
                own = sign.gather(-1, state["basis_order"][..., self.rank :].long())
                rest.mul_(own.unsqueeze(-1).to(rest))

    def _of_active(self, state: State, values: Tensor) -> Tensor:
        """Entries ``(..., r)`` of ``(..., k)`` that belong to the vectors in use."""
        return values.gather(-1, self._active(state)) if self.exact else values

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        r"""``W <- decay W + U' diag(s') V'^T - U diag(decay s) V^T``, rounded once.

        The difference is taken of the factors, not of the products: a step of zero is no step.
        """
        values = self.values([state], [update], into.lr, of_all(into.guarded_decay()))
        deque(self._push_([into], [state], [update], values), maxlen=0)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each: singular values of all at once, vectors of as many as a tile holds."""
        first, plain = intos[0], type(self).push_ is Spectral.push_
        alike = all(into.lr == first.lr and into.across is None for into in intos)
        if not (plain and alike and first.param.dim() == 2):
            yield from super().push_all_(intos, states, updates, terms)
            return
        values = self.values(states, updates, first.lr, of_each(guarded(intos)))
        for at in self._several(states, first.param):
            own = [intos[n] for n in at]
            lists = [states[n] for n in at], [updates[n] for n in at]
            numbers = self._push_(own, *lists, values.of(at))
            if len(at) == 1:  # what is alone has been kept before it counts as written
                deque(numbers, maxlen=0)
                yield at[0]
                continue
            for n in numbers:
                yield at[n]

    def _push_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        values: Values,
    ) -> Iterator[int]:
        """:meth:`push_` of matrices that are computed as one.

        Args:
            intos: alike but for the weights.
            states: of each.
            updates: of each.
            values: the step of their singular values.
        """
        first, wide = intos[0], states[0]["basis_u"].dtype
        dtype = wide if first.rounding is not None else first.param.dtype
        sides = self.vectors(states, updates, first.lr, values, dtype, first.across)
        lefts, rights = ([stacked(side.moves)] for side in sides)
        for where, us, vs in self.rest(states):
            gained = values.gained.gather(-1, where).unsqueeze(-1)
            lefts.append(stacked(us))
            rights.append(stacked(vs) * gained)
        if first.param.dtype != wide and len(lefts) > 1:  # rounded once
            lefts, rights = ([torch.cat([x.to(dtype) for x in own], -2)] for own in (lefts, rights))
        count = 0  # weights are touched when all memory is there
        try:
            for left, right in zip(lefts, rights, strict=True):
                ones = [1.0] * len(intos)
                for n in lift_all_(intos, [*left.mT], [*right], [None] * len(intos), ones):
                    if left is lefts[-1]:
                        count = n + 1
                        yield n
                intos = [into._replace(decay=1.0, guarded=None) for into in intos]
        finally:  # if another could not be written too
            if count:
                self.keep_(states[:count], sides, values)


def of_all(decay: float | Tensor) -> float | Tensor:
    """A decay that all singular values of a matrix, and of its experts, have in common."""
    return decay.reshape(-1)[:1] if isinstance(decay, Tensor) else decay


def of_each(intos: Sequence[Target]) -> float | Tensor:
    """The decays of several matrices ``(b, 1)``; a number that they have in common."""
    decays = [into.guarded_decay() for into in intos]
    if isinstance(decays[0], Tensor):
        return stacked(decays).reshape(len(decays), -1)[:, :1]  # type: ignore[arg-type]
    if len({*decays}) == 1:
        return decays[0]
    like = intos[0].param
    every = torch.tensor(decays, dtype=torch.promote_types(like.dtype, torch.float32))
    return sent(every, like.device).unsqueeze(1)


def _small(states: Sequence[State]) -> State:
    """Singular values of several matrices, and the order of theirs that have one."""
    keys = [key for key in ("basis_s", "basis_order") if key in states[0]]
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
