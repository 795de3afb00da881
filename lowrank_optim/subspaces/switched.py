"""SwitchLoRA: a step of two factors of the weight, whose vectors are exchanged with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.stacked import stacked
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.pooled import SIDES, Pooled
from lowrank_optim.subspaces.refresh import Reduce, identity
from lowrank_optim.subspaces.switching import where
from lowrank_optim.subspaces.target import Target, decayed_, guarded
from lowrank_optim.subspaces.terms import Term


@dataclass(frozen=True)
class Switched(Pooled):
    r"""Coordinates of :math:`W = W_0 + s B A`: :math:`g_A = s B^T G` and :math:`g_B = s G A^T`.

    W is dense and is never touched by a switch: :math:`W_0 = W - s B A` is implicit, so exchanging
    a vector of A or of B with one of its pool moves the difference into it by itself. Exchanging
    row i of A makes gradient and moments of column i of B meaningless, and nothing else: those
    moments start again from zero, and the column is frozen for ``freeze_steps`` steps.

    The arguments and the state are those of :class:`~lowrank_optim.subspaces.pooled.Pooled`.
    """

    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """Gradients of A and of B transposed, zero where frozen."""
        grad = self.natural(grad)
        low = {
            "A": ops.project(state["basis_B"].mT, grad),
            "B": ops.project(state["basis_A"].mT, grad.mT),
        }
        low = {side: reduce(x).mul_(self.s) for side, x in low.items()}
        self.still_([state], [low])
        return low

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; of several all but the products is one kernel."""
        if type(self).coords is not Switched.coords:
            return super().coords_of(states, grads)
        found: list[dict[str, Tensor]] = []
        for at in self._several(states, grads[0]):
            if len(at) == 1:
                found.append(self.coords(states[at[0]], grads[at[0]], reduce=identity))
                continue
            factors = self._whole([states[n] for n in at])
            dtype = ops.product_dtype(grads[0].dtype)
            lows = {side: torch.empty_like(x, dtype=dtype) for side, x in factors.items()}
            narrow = {side: x.to(grads[0].dtype).unbind(0) for side, x in factors.items()}
            parts = zip(*(x.unbind(0) for x in lows.values()), strict=True)
            for n, (low_a, low_b), a, b in zip(at, parts, *narrow.values(), strict=True):
                grad = self.natural(grads[n])
                ops.project(b.mT, grad, low_a)
                ops.project(a.mT, grad.mT, low_b)
            torch._foreach_mul_([*lows.values()], self.s)
            each = zip(*(x.unbind(0) for x in lows.values()), strict=True)
            found += [dict(zip(SIDES, xs, strict=True)) for xs in each]
            self.still_([states[n] for n in at], found[at.start :])
        return found

    def _several(self, states: Sequence[State], like: Tensor) -> list[range]:
        """Which matrices like ``like`` are computed as one."""
        size = sum(states[0][f"basis_{side}"].numel() for side in SIDES)
        return fillings(len(states), 2 * size, like)  # of what moves W each factor is half

    @staticmethod
    def _whole(states: Sequence[State]) -> dict[str, Tensor]:
        """Factors of several matrices, as those of a batch."""
        return {side: stacked([state[f"basis_{side}"] for state in states]) for side in SIDES}

    def still_(self, states: Sequence[State], coords: Sequence[dict[str, Tensor]]) -> None:
        """Set frozen rows of ``coords`` to zero, those of several matrices at once.

        Their moments are zero since the switch and stay zero, so their direction is zero too.
        """
        rows = [
            x[..., own, :]
            for state, low in zip(states, coords, strict=True)
            for frozen, x in zip(state["host.frozen"].tolist(), low.values(), strict=True)
            for own in where(frozen)
        ]
        if rows:
            torch._foreach_zero_(rows)

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        r""":math:`W \leftarrow W + s (B' A' - B A)` as one GEMM of inner dimension 2 r.

        In terms of the moves: :math:`\Delta B A' + B \Delta A`, which does not cancel.
        """
        moved = self.moved(into, state, update)
        left, right = _moves(moved, into)
        decay = into.guarded_decay() if self.decay_on == "weight" else 1.0
        self._lift_(into, left, right, decay)
        self.keep_(state, moved)

    def _lift_(self, into: Target, left: Tensor, right: Tensor, decay: float | Tensor) -> None:
        rounding = None if into.rounding is None else self.natural(into.rounding)
        param = self.natural(into.param)
        ops.lift_add_(param, left.mT, right, None, decay, self.s, rounding)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each; factors of several are stepped as one tensor."""
        first, plain = intos[0], type(self).push_ is Switched.push_
        if not plain or any(into.lr != first.lr for into in intos):
            yield from super().push_all_(intos, states, updates, terms)
            return
        for at in self._several(states, first.param):
            if len(at) == 1:
                self.push_(intos[at[0]], states[at[0]], updates[at[0]], terms[at[0]])
                yield at[0]
                continue
            own, factors = [intos[n] for n in at], self._whole([states[n] for n in at])
            decay: float | Tensor = 1.0
            if self.decay_on == "factors":
                decays = [into.guarded_decay() for into in guarded(own)]
                decay = decays[0]
                if isinstance(decay, Tensor):
                    decay = stacked(decays).reshape(len(at), 1, 1)  # type: ignore[arg-type]
            frozen = [states[n]["host.frozen"].tolist() for n in at]
            moved = {}
            for i, (side, old) in enumerate(factors.items()):
                step = stacked([updates[n][side] for n in at])
                moved[side] = _moved(old, step, first.lr, decay, [rows[i] for rows in frozen])
            left, right = _moves(moved, first)
            of_weight = decayed_(own) if self.decay_on == "weight" else [1.0] * len(at)
            count = 0
            try:
                for n, a, b, factor in zip(at, right, left, of_weight, strict=True):
                    self._lift_(intos[n], b, a, factor)
                    count += 1
                    yield n
            finally:  # if another could not be written too
                if count:
                    news = [x for new, _ in moved.values() for x in new[:count]]
                    olds = [states[n][f"basis_{side}"] for side in moved for n in at[:count]]
                    torch._foreach_copy_(olds, news)

    def moved(
        self, into: Target, state: State, update: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Both factors after the step, each with how far it came."""
        decay = into.guarded_decay() if self.decay_on == "factors" else 1.0
        out = {}
        for rows, (side, step) in zip(state["host.frozen"].tolist(), update.items(), strict=True):
            old, move = (x.unsqueeze(0) for x in (state[f"basis_{side}"], step))
            new, by = _moved(old, move, into.lr, decay, [rows])
            out[side] = new[0], by[0]
        return out

    def keep_(self, state: State, moved: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Write the factors of :meth:`moved`."""
        sides = [state[f"basis_{side}"] for side in moved]
        torch._foreach_copy_(sides, [new for new, _ in moved.values()])


def _moved(
    old: Tensor, step: Tensor, lr: float, decay: float | Tensor, frozen: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """One factor ``(b, ..., r, n)`` of b matrices after a step, and how far it came."""
    decayed = old * decay if isinstance(decay, Tensor) or decay != 1 else old
    new = torch.sub(decayed, step.to(old.dtype), alpha=lr)
    still = [(i, own) for i, rows in enumerate(frozen) for own in where(rows)]
    if still:  # neither decay nor, with eps = 0, a direction of 0 / 0
        torch._foreach_copy_(
            [new[i, ..., own, :] for i, own in still], [old[i, ..., own, :] for i, own in still]
        )
    return new, new - old


def _moves(moved: Mapping[str, tuple[Tensor, Tensor]], into: Target) -> tuple[Tensor, Tensor]:
    """Rows b and a of ``s sum b a^T``, by which W moves, in the format that its product takes."""
    (a, da), (b, db) = moved["A"], moved["B"]
    rank, dtype = a.shape[-2], into.param.dtype if into.rounding is None else a.dtype
    left, right = (x.new_empty((*x.shape[:-2], 2 * rank, x.shape[-1]), dtype=dtype) for x in (b, a))
    left[..., :rank, :].copy_(db)
    torch.sub(b, db, out=left[..., rank:, :])  # b is new already
    right[..., :rank, :].copy_(a)
    right[..., rank:, :].copy_(da)
    return left, right
