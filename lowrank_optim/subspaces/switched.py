"""SwitchLoRA: a step of two factors of the weight, whose vectors are exchanged with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.numbers import on_device
from lowrank_optim.ops.stacked import empty_like_all, over_all, stacked
from lowrank_optim.ops.tiles import fillings
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.pooled import SIDES, Pooled
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

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """Gradients of A and of B transposed, zero where frozen."""
        grad = self.natural(grad)
        low = {
            "A": ops.project(state["basis_B"].mT, grad),
            "B": ops.project(state["basis_A"].mT, grad.mT),
        }
        low = {side: x.mul_(self.s) for side, x in low.items()}
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
                found.append(self.coords(states[at[0]], grads[at[0]]))
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
        lists = {side: [low[side] for low in coords] for side in SIDES}
        rows = _rows(_frozen(states), lists)
        if rows:
            torch._foreach_zero_(rows)

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        r""":math:`W \leftarrow W + s (B' A' - B A)` as one GEMM of inner dimension 2 r.

        In terms of the moves: :math:`\Delta B A' + B \Delta A`, which does not cancel.
        """
        news, moves = self._stepped([into], [state], [update], self._format(into, state))
        decay = into.guarded_decay() if self.decay_on == "weight" else 1.0
        self._lift_(into, moves["B"][0], moves["A"][0], decay)
        self.keep_([state], news)

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
            own, held = [intos[n] for n in at], [states[n] for n in at]
            dtype = self._format(first, states[0])
            news, moves = self._stepped(own, held, [updates[n] for n in at], dtype)
            of_weight = decayed_(own) if self.decay_on == "weight" else [1.0] * len(at)
            count = 0
            try:
                for n, a, b, factor in zip(at, moves["A"], moves["B"], of_weight, strict=True):
                    self._lift_(intos[n], b, a, factor)
                    count += 1
                    yield n
            finally:  # if another could not be written too
                if count:
                    self.keep_(held[:count], news)

    @staticmethod
    def _format(into: Target, state: State) -> torch.dtype:
        """That of the product by which W moves."""
        return into.param.dtype if into.rounding is None else state["basis_A"].dtype

    def _stepped(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        moved: torch.dtype | None,
    ) -> tuple[dict[str, Sequence[Tensor]], dict[str, list[Tensor]]]:
        """Factors of alike matrices after the step, and the rows by whose products they move W.

        None are returned of a side that is stepped where it lies. Frozen rows stay: neither decay
        nor, with eps = 0, a direction of 0 / 0.

        Args:
            intos: what they belong to.
            states: of each.
            updates: of each.
            moved: format of what W moves by; None for none.
        """
        first, decay, decays = intos[0], 1.0, []
        like = states[0]["basis_A"]
        if self.decay_on == "factors":
            found = [into.guarded_decay() for into in guarded(intos)]
            decays = on_device([x for x in found if isinstance(x, Tensor)], like)
            decay = found[0] if isinstance(found[0], float) else 1.0
        olds = {side: [x[f"basis_{side}"] for x in states] for side in SIDES}
        outs: dict[str, Sequence[Tensor]] = {}
        moves: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for side, xs in olds.items():
            *batch, rank, size = xs[0].shape
            if moved is None:
                outs[side] = empty_like_all(xs, xs[0].shape, xs[0].dtype)
            else:
                outs[side] = over_all(xs)
                moves[side] = empty_like_all(xs, (*batch, 2 * rank, size), moved)
        apart = {side: xs for side, xs in outs.items() if xs is not olds[side]}
        frozen = _frozen(states)
        still = _rows(frozen, olds)
        if still and len(apart) < len(outs):
            still = _copies(still)
        for side, xs in olds.items():
            steps = [update[side] for update in updates]
            own = xs, steps, outs[side], moves[side]
            ops.step_rows_(*own, first.lr, decay, side == "A", decays)
        if still:
            torch._foreach_copy_(_rows(frozen, outs), still)
        if still and moved is not None:
            turned = {side: 1 if side == "A" else -1 for side in SIDES}  # B' - B comes first
            halves = {s: [x.chunk(2, -2)[:: turned[s]] for x in own] for s, own in moves.items()}
            whole, by = ({s: [x[n] for x in own] for s, own in halves.items()} for n in (0, 1))
            torch._foreach_copy_(_rows(frozen, whole), still)
            torch._foreach_zero_(_rows(frozen, by))
        return apart, moves

    def keep_(self, states: Sequence[State], news: Mapping[str, Sequence[Tensor]]) -> None:
        """Write what :meth:`_stepped` found, of the first of the matrices."""
        if news:
            olds = [state[f"basis_{side}"] for side in news for state in states]
            torch._foreach_copy_(olds, [x for own in news.values() for x in own[: len(states)]])


Rows = Sequence[Sequence[Sequence[slice]]]


def _frozen(states: Sequence[State]) -> Rows:
    """Which rows of each matrix's A and B are frozen."""
    return [[where(own) for own in state["host.frozen"].tolist()] for state in states]


def _rows(rows: Rows, lists: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    """Some rows of what matrices have of each side, matrix by matrix."""
    return [
        lists[side][n][..., own, :]
        for n, sides in enumerate(rows)
        for side, slices in zip(SIDES, sides, strict=True)
        for own in slices
    ]


def _copies(xs: Sequence[Tensor]) -> list[Tensor]:
    """Of all at once."""
    made = [torch.empty_like(x) for x in xs]
    torch._foreach_copy_(made, [*xs])
    return made
