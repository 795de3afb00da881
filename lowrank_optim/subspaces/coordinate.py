"""Rows and columns of a gradient as its coordinates: no basis, no product, exact transport."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.devices import sent
from lowrank_optim.ops.numbers import is_number, number_of
from lowrank_optim.ops.stacked import empty_like_all
from lowrank_optim.ops.tiles import tiles
from lowrank_optim.subspaces.base import State, Subspace, register
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.target import Target, gains_of, of_kernels
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_index

FREE = {"sign": "sign", "raw": "sgd"}
"""Free rule of the fused apply for each kind of term that it takes."""


@dataclass(frozen=True)
class Coordinates(Subspace):
    r"""A random set of rows of the canonical view: :math:`R = G_I`, ``dW = N`` in those rows.

    The set is drawn from (seed, parameter, step), kept sorted, and shared by the experts of a
    batch. Since :math:`P^T P` and :math:`P P^T` are selections, what is outside is exact too: a
    weight moves by the rule or by the residual, never by both.

    Args:
        rank: number of rows k.
        scale: factor of their update.
    """

    needs_grad: ClassVar[bool] = False
    sees_all: ClassVar[bool] = False
    takes_wide: ClassVar[bool] = True

    def reproducible(self, count: int) -> bool:
        """Indices are drawn, and no number is computed."""
        return True

    @classmethod
    def limit(cls, view: MatrixView) -> int:
        """All of them."""
        return view.m

    @classmethod
    def directions(cls, rank: int | float, view: MatrixView) -> int:
        """``floor(density m)`` and at least one, or as many as the rank."""
        return view.share(rank, view.m) if isinstance(rank, float) else rank

    def init(self, view: MatrixView, param: Tensor) -> State:
        """The indices, and no basis."""
        return {"index": torch.arange(self.rank, dtype=torch.int32, device=param.device)}

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:
        """Rows of the matrix, ascending."""
        check_index(state, "index", view.m, "ascending")

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Draw a new set; rows that stay say where they were."""
        index = state["index"]
        old = index.clone()
        drawn = torch.randperm(ctx.view.m, generator=ctx.generator)[: self.rank]
        index.copy_(sent(drawn.sort().values, index.device))
        new = index.clone()
        return {"low": BasisChange(lambda: _shared(new, old), source=source_of(new, old))}

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """One coordinate, ``low (..., k, n)``."""
        return {"low": (*view.batch, self.rank, view.n)}

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """The rows ``(..., k, n)``, contiguous."""
        index = state["index"]
        if grad.stride(-1) > grad.stride(-2):  # stored the other way: gather along its lines
            return {"low": grad.mT.index_select(-1, index).mT.contiguous()}
        return {"low": grad.index_select(-2, index)}

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; those of several lie one after the other in memory."""
        if len(grads) == 1:
            return super().coords_of(states, grads)
        (*batch, _, n), dtype = grads[0].shape, grads[0].dtype
        lows = empty_like_all(grads, (*batch, self.rank, n), dtype)
        for state, grad, low in zip(states, grads, lows, strict=True):
            torch.index_select(grad, -2, state["index"], out=low)
        return [{"low": low} for low in lows]

    def bases(self, state: State, view: MatrixView) -> list[Tensor]:
        """Unit vectors."""
        return [torch.eye(view.m, dtype=torch.float64)[state["index"].long()].mT]

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """One pass over W and G, each entry read once and rounded once."""
        deque(self.push_all_([into], [state], [update], [term]), maxlen=0)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each; those that have all factors in common in one kernel."""
        alike: dict[Any, list[int]] = {}
        for n, (into, term) in enumerate(zip(intos, terms, strict=True)):
            if fusible(into, term):
                free, gain = ("none", 0.0) if term is None else (FREE[term.kind], term.gain)
                own = number_of(gain), isinstance(gain, Tensor)
                alike.setdefault((into.numbers, into.read, own, free), []).append(n)
            else:
                assert into.step is None  # as takes_step has it
                self._push_tiles_(into, states[n], updates[n], term)
                yield n
        for ((decay, lr), _, (gain, _), free), at in alike.items():
            some, gains = [intos[n] for n in at], gains_of([terms[n] for n in at], intos[0].param)
            ops.coordinate_add_(
                [into.param for into in some], [into.grad for into in some],
                [states[n]["index"] for n in at], [updates[n]["low"] for n in at],
                decay, lr, self.scale, gain, free, *of_kernels(some), gains,
            )  # fmt: skip
            yield from at

    def takes_step(self, param: Tensor, term: Term | None) -> bool:
        """All that the one-pass op takes."""
        return _takes(term)

    def _push_tiles_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """With a term of factors a column, a factor on the device, or stochastic rounding."""
        low, index = update["low"], state["index"]
        place = torch.full((into.param.shape[-2],), -1, dtype=torch.long, device=index.device)
        place[index.long()] = torch.arange(self.rank, device=index.device)

        def put(rest: Tensor, extra: Tensor, start: int) -> Tensor:
            if not self.rank:
                return rest
            at = place[start : start + rest.shape[-2]]
            own = low.index_select(-2, at.clamp(min=0)).to(rest.dtype)
            return torch.where(at.unsqueeze(-1) >= 0, own * self.scale + extra, rest)

        spans = tiles(into.param.shape[-2], ops.tile_rows(into.param))
        add_by_tiles_(into, term, self.scale, put, spans)


def source_of(new: Tensor, old: Tensor) -> Tensor:
    """For each entry of ``new (..., r)`` where it is in ``old``, both sorted, or -1."""
    if not old.shape[-1]:
        return torch.empty_like(new)
    at = torch.searchsorted(old, new, out_int32=True).clamp_(max=old.shape[-1] - 1)
    return torch.where(old.gather(-1, at.long()) == new, at, -1)


def _shared(new: Tensor, old: Tensor) -> Tensor:
    """``P_new^T P_old``."""
    return (new.unsqueeze(1) == old.unsqueeze(0)).double()


@register("columns")
@dataclass(frozen=True)
class Columns(Coordinates):
    """Random columns of the stored matrix (its dimension 1), whatever ``proj_type`` says.

    References:
        Zmushko et al. (2025), arXiv:2411.07837: ``coord_choice="columns"``.
    """

    @classmethod
    def side(cls, proj_type: str) -> str:
        """The columns."""
        return "right"


@register("rows")
@dataclass(frozen=True)
class Rows(Coordinates):
    """Random rows of the stored matrix (its dimension 0), whatever ``proj_type`` says.

    References:
        Zmushko et al. (2025), arXiv:2411.07837: ``coord_choice="rows"``.
    """

    @classmethod
    def side(cls, proj_type: str) -> str:
        """The rows."""
        return "left"


# ---------------------------------------------------------------- the apply in tiles


def fusible(into: Target, term: Term | None) -> bool:
    """Whether the one-pass op takes this apply: one decay a matrix, rounding to nearest."""
    return is_number(into.decay) and into.rounding is None and _takes(term)


def _takes(term: Term | None) -> bool:
    return term is None or (term.kind in FREE and is_number(term.gain))


def add_by_tiles_(
    into: Target,
    term: Term | None,
    scale: float,
    put: Callable[[Tensor, Tensor, int], Tensor],
    spans: Iterable[slice],
) -> None:
    """``W <- decay W - lr update``, tiles of whole rows, each rounded once into W.

    Args:
        into: weights, gradient and factors.
        term: what moves the entries outside the subspace.
        scale: of the subspace.
        put: gives the update of a tile from what moves it outside, what the residual adds inside,
            and its first row.
        spans: rows of each tile.
    """
    w, g = into.param, into.grad
    dtype, decay = torch.promote_types(w.dtype, torch.float32), into.guarded_decay()
    for rows in spans:
        tile, start = w[..., rows, :], rows.start
        rest = _outside(g[..., rows, :].to(dtype), term)
        inside = rest * (1 - scale) if term is not None and term.kind == "scaled" else rest * 0
        update = put(rest, inside, start) * into.lr
        if into.finite is not None:
            update = torch.where(into.finite, update, 0.0)
        new = tile.to(dtype) * decay - update
        ops.put_(tile, new, None if into.rounding is None else into.rounding.narrow(-2, start))


def _outside(g: Tensor, term: Term | None) -> Tensor:
    """What moves the entries outside the subspace."""
    if term is None:
        return torch.zeros_like(g)
    if term.kind == "scaled":
        assert term.columns is not None
        return g * term.columns
    return term.of_(g.clone())
