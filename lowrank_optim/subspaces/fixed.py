"""Fixed orthonormal bases, known to all: a matrix keeps the indices of r of their vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.cosine import column_tiles, together
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.stacked import cast_all, empty_like_all, stacked
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import State
from lowrank_optim.subspaces.coordinate import source_of
from lowrank_optim.subspaces.projector import Projector
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.subspaces.shared import Shared
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_index

SPECTRUM_ELEMENTS = 1 << 24
"""Spectra up to this size (64 MiB) are kept while the best of them are chosen."""


class Spectrum(NamedTuple):
    """What is known of the coefficients of a gradient."""

    scores: Tensor
    """``(m,)``."""
    whole: Tensor | None = None
    """All coefficients ``(m, n)``, where they are kept."""
    parts: Sequence[Tensor] = ()
    """The same, as they were transformed."""


class Choice(NamedTuple):
    """What a choice of vectors says, on its device."""

    source: Tensor
    """``(r,)``: where each stood among the old ones, -1 for nowhere."""
    finite: Tensor
    """Whether the gradient is: 0-d bool."""
    usable: Tensor
    """Whether it said something: 0-d bool. Else the old ones stay."""
    low: Tensor | None = None
    """Its coordinates ``(r, n)``, where they are at hand."""


@dataclass(frozen=True)
class FixedBasis(Projector):
    r"""The r vectors of a fixed orthonormal basis Q with the largest coefficients.

    .. math:: S = Q^T G, \qquad I = \mathrm{top}_r \|S_{j,:}\|, \qquad P = Q_{:,I}

    With ``ranking="l2"`` no other r vectors of Q capture more of G:
    :math:`\|G - P P^T G\|^2 = \|G\|^2 - \sum_{j \in I} \|S_j\|^2 \le (1 - r/m) \|G\|^2`. The state
    of a matrix is I, sorted, in int32. Q is one matrix per width and device, shared by all
    matrices of an optimizer; it is rebuilt, never saved. A refresh moves no vector: rows of the
    moments whose index stays go to their new place, the others start again.

    A newcomer writes :meth:`vectors` and registers the class.

    Args:
        ranking: norm by which coefficients are ranked, "l2" or "l1", which one large entry sways
            less (default: "l2").
        update_proj_gap: steps between refreshes, of the group.
        shared: where the optimizer keeps Q.
        columns: those of a larger matrix that are stepped here: start, stop, and how many it has.
    """

    indexed: ClassVar[bool] = True

    ranking: str = "l2"
    update_proj_gap: int = 1
    shared: Shared = field(default_factory=Shared, compare=False, repr=False)
    columns: tuple[int, int, int] | None = None

    @abstractmethod
    def vectors(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Q ``(n, n)``, one vector a **row**."""

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Indices of this very basis."""
        return type(self).__name__, *self._variant(), self.rank, self.two_sided

    def sharing(self, shared: Shared) -> Self:
        """This subspace, with its basis where the optimizer keeps it."""
        return replace(self, shared=shared)

    def prepare(self, view: MatrixView, like: Tensor) -> None:
        """Build what a step will share."""
        self._rows(view.m, like)
        if self.two_sided:
            self._rows(view.n, like)

    def init(self, view: MatrixView, param: Tensor) -> State:
        """The first r vectors."""
        first = torch.arange(self.rank, dtype=torch.int32, device=param.device)
        keys = ("basis_index", "basis_index_right")[: 1 + self.two_sided]
        return {key: first.repeat(*view.batch, 1) for key in keys}

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:
        """Indices of vectors, ascending."""
        check_index(state, "basis_index", view.m, "ascending")
        check_index(state, "basis_index_right", view.n, "ascending")

    def bases(self, state: State, view: MatrixView) -> list[Tensor]:
        """Their columns, in float64."""
        sizes = {"basis_index": view.m, "basis_index_right": view.n}
        return [
            self.vectors(n, torch.float64, state[key].device)[state[key].long()].mT
            for key, n in sizes.items()
            if key in state
        ]

    def find(self, grad: Tensor, previous: Tensor | None, ctx: RefreshContext) -> Tensor:
        """The columns that a refresh would choose."""
        index = torch.zeros(*grad.shape[:-2], self.rank, dtype=torch.int32, device=grad.device)
        self._choose_(index, self._scores(grad)[0])
        return self._columns(grad, index)

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Choose indices, and say where the rows of the old ones are."""
        fine = ctx.fine
        rotation, source, low = self._replace_(state["basis_index"], grad, ctx.seen, fine)
        if not self.two_sided:
            return {"low": BasisChange(rotation, source=source, low=low, ok=fine)}
        right, source_right, _ = self._replace_(state["basis_index_right"], grad.mT, None, fine)
        return {"low": BasisChange(rotation, right, source, source_right, ok=fine)}

    def _replace_(
        self, index: Tensor, grad: Tensor, scores: Tensor | None, fine: Tensor | None
    ) -> tuple[Callable[[], Tensor], Tensor, Tensor | None]:
        old = index.clone()
        parts: list[Tensor] = []
        if scores is None:
            scores, parts = self._scores(grad)
        source = self._choose_(index, scores)
        moves = fine
        if index.dim() > 1:  # an expert without tokens keeps its indices
            busy = ops.matrix_norm(grad).squeeze(-1) != 0
            moves = busy if fine is None else busy & fine
        if moves is not None:
            index.copy_(torch.where(moves, index, old))
            stay = torch.arange(self.rank, dtype=source.dtype, device=source.device)
            source = torch.where(moves, source, stay)
        low = self._low(grad, parts, index) if parts else None
        return _rotation(source, grad.dtype), source, low

    def _low(self, grad: Tensor, parts: Sequence[Tensor], index: Tensor) -> Tensor:
        """Coordinates ``(r, n)`` of what was transformed."""
        low = parts[0].new_empty(self.rank, grad.shape[1])
        for columns, part in zip(column_tiles(grad), parts, strict=True):
            low[:, columns] = self._take(grad, part, index.long()).mT
        return low

    def looking(self, grad: Tensor) -> Searching[tuple[Tensor | None, Any]]:
        """An accelerator looks at the coefficients of several gradients at once."""
        if not self._shares(grad):
            return self.look(grad)
        spectrum = yield Ask(_spectra, (grad,), (self,), listed=True)
        return None, spectrum

    def _shares(self, grad: Tensor) -> bool:
        """Whether a refresh chooses for several matrices at once."""
        own = type(self).refresh_ is not FixedBasis.refresh_
        own |= not self.selects
        return not own and grad.dim() == 2 and grad.numel() > 0 and on_accelerator(grad)

    def refreshing_(
        self, state: State, grad: Tensor, ctx: RefreshContext
    ) -> Searching[dict[str, BasisChange]]:
        """On an accelerator one choice for all matrices, which says whether a gradient is fine."""
        if not self._shares(grad):
            return self.refresh_(state, grad, ctx)
        own = yield from self._choosing(state["basis_index"], grad, ctx.seen)
        moved = BasisChange(_rotation(own.source, grad.dtype), None, own.source, None, low=own.low)
        if self.two_sided:
            right = yield from self._choosing(state["basis_index_right"], grad.mT, None)
            rotation = _rotation(right.source, grad.dtype)
            moved = moved._replace(right=rotation, source_right=right.source, low=None)
        sure = self.ranking == "l2"  # sums of absolute values say nothing of squares
        return {"low": moved._replace(ok=own.usable, finite=own.finite if sure else None)}

    def _choosing(self, index: Tensor, grad: Tensor, seen: Any) -> Searching[Choice]:
        """Write the indices of one side, those of several matrices at once."""
        spectrum = Spectrum(seen) if isinstance(seen, Tensor) else seen
        if spectrum is None:
            spectrum = yield Ask(_spectra, (grad,), (self,), listed=True)
        source, finite, usable = yield Ask(_choose_all_, (index, spectrum.scores), listed=True)
        low = None
        if spectrum.whole is not None:
            low = yield Ask(_rows_at, (spectrum.whole, index))
        elif spectrum.parts:
            low = self._low(grad, spectrum.parts, index)
        return Choice(source, finite, usable, low)

    def scores(self, grad: Tensor) -> Tensor | None:
        """Sums over columns, but for two sides or idle experts."""
        if self.two_sided or grad.dim() > 2:
            return None
        if grad.numel() == 0:
            return grad.new_zeros(grad.shape[0], dtype=compute_dtype(grad.dtype))
        return self._scores(grad)[0]

    def changed(self, before: State, after: State) -> dict[str, BasisChange] | None:
        """Where the vectors in use were."""
        new, old = after["basis_index"], before["basis_index"]
        if not self.two_sided:
            return {"low": BasisChange(source=source_of(new, old))}
        right = source_of(after["basis_index_right"], before["basis_index_right"])
        return {"low": BasisChange(source=source_of(new, old), source_right=right)}

    def of_columns(self, start: int, stop: int, n: int) -> Self:
        """Of two sides: the right basis is of all columns, and some of its rows are used."""
        return replace(self, columns=(start, stop, n)) if self.two_sided else self

    def _right(self, like: Tensor, index: Tensor) -> Tensor:
        """Q ``(..., n, r)`` of the columns that are here."""
        start, stop, n = self.columns or (0, like.shape[-1], like.shape[-1])
        return self._columns(like, index, n)[..., start:stop, :]

    def _choose_(self, index: Tensor, scores: Tensor) -> Tensor:
        """Indices ``(..., r)`` of the largest ``scores (..., m)``, and the places of the old."""
        source = torch.empty_like(index)
        if index.dim() == 1:
            ops.top_rows_([scores], [index], [source])
        else:
            ops.top_rows_([*scores.unbind(0)], [*index.unbind(0)], [*source.unbind(0)])
        return source

    def _scores(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``(..., m)``, and what was transformed where keeping it saves doing it again."""
        if grad.dim() > 2:
            return torch.stack([self._scores(x)[0] for x in grad.unbind(0)]), []
        keep = self.update_proj_gap == 1 and not self.two_sided
        keep = keep and grad.numel() <= SPECTRUM_ELEMENTS
        parts, scores, sizes = [], None, None
        for columns in column_tiles(grad):
            part = self._analyse(grad[:, columns])
            if sizes is None or sizes.shape != part.shape:
                sizes = torch.empty_like(part)
            torch.abs(part, out=sizes) if self.ranking == "l1" else torch.mul(part, part, out=sizes)
            scores = sizes.sum(0) if scores is None else scores.add_(sizes.sum(0))
            parts += [part] if keep else []
        assert scores is not None
        return self._in_order(grad, scores), parts

    def _spectra(self, grads: Sequence[Tensor]) -> list[Spectrum]:
        """Of alike matrices, on an accelerator: a product each, and sums of as many as a tile."""
        grad, rows = grads[0], self._rows(grads[0].shape[0], grads[0])
        tiles = list(column_tiles(grad))
        keep = self.update_proj_gap == 1 and not self.two_sided and len(tiles) == 1
        keep = keep and len(grads) * grad.numel() <= SPECTRUM_ELEMENTS
        found: list[Spectrum] = []
        for start in range(0, len(grads), together(grad)):
            own, scores = grads[start : start + together(grad)], None
            for columns in tiles:
                parts = cast_all([x[:, columns] for x in own], rows.dtype)
                whole = rows.new_empty(len(own), *parts[0].shape)
                for x, part in zip(parts, whole.unbind(0), strict=True):
                    torch.mm(rows, x, out=part)
                sums = torch.linalg.vector_norm(whole, 1 if self.ranking == "l1" else 2, dim=-1)
                sums = sums if self.ranking == "l1" else sums.square_()
                scores = sums if scores is None else scores.add_(sums)
            assert scores is not None
            wholes = whole.unbind(0) if keep else [None] * len(own)
            lists = scores.unbind(0), wholes
            found += [Spectrum(*each) for each in zip(*lists, strict=True)]
        return found

    def _rows(self, n: int, like: Tensor) -> Tensor:
        """Q of the shared ones, a vector a row, in at least float32."""
        dtype, device = compute_dtype(like.dtype), like.device
        key = (type(self).__name__, *self._variant(), n, dtype, device)
        rows: Tensor = self.shared.get(key, lambda: (self.vectors(n, dtype, device),))[0]
        return rows

    def _variant(self) -> tuple[Any, ...]:
        """What else Q depends on."""
        return ()

    def _columns(self, like: Tensor, index: Tensor, n: int | None = None) -> Tensor:
        """P ``(..., m, r)``, a copy of r rows of Q seen from the other side."""
        rows = self._rows(n or like.shape[-2], like)
        return rows[index.long()].mT

    def _analyse(self, x: Tensor) -> Tensor:
        """Coefficients ``(c, p)`` of the columns of ``x (m, c)``, in an order of its own."""
        rows = self._rows(x.shape[0], x)
        return x.mT.to(rows.dtype) @ rows.mT

    def _in_order(self, like: Tensor, scores: Tensor) -> Tensor:
        """Scores by index, of those by column of :meth:`_analyse`."""
        return scores

    def _take(self, like: Tensor, part: Tensor, index: Tensor) -> Tensor:
        """Coefficients ``(c, r)`` by index."""
        return part.index_select(1, index)

    def _dense(self, states: Sequence[State], like: Tensor, dtype: torch.dtype) -> Sequence[State]:
        """The states of a projector that keeps its columns; those of several gathered at once."""
        bases = self._columns(like, stacked([state["basis_index"] for state in states]))
        dense: list[State] = [{"basis": basis} for basis in bases.to(dtype).unbind(0)]
        if self.two_sided:
            for own, state in zip(dense, states, strict=True):
                own["basis_right"] = self._right(like, state["basis_index_right"]).to(dtype)
        return dense

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """``P^T G``, by a product with the chosen columns."""
        return super().coords_of(self._dense(states, grads[0], grads[0].dtype), grads)

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of any projector, with the chosen columns."""
        param = intos[0].param
        yield from super().push_all_(intos, self._dense(states, param, param.dtype), updates, terms)


def _rotation(source: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """``P_new^T P_old`` of two sets of indices, by where each of the new stood."""

    def rotation() -> Tensor:
        old = torch.arange(source.shape[-1], dtype=source.dtype, device=source.device)
        return (source.unsqueeze(-1) == old).to(compute_dtype(dtype))

    return rotation


def _spectra(grads: list[Tensor], subspace: FixedBasis) -> list[Spectrum]:
    return subspace._spectra(grads)


def _choose_all_(
    indices: list[Tensor], scores: list[Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Write new indices where a gradient says something; where each stood, and what is known.

    That is whether the gradient is finite, and whether it said something.
    """
    sources = empty_like_all(indices, indices[0].shape, indices[0].dtype)
    finite, usable = (empty_like_all(scores, (), torch.bool) for _ in range(2))
    ops.top_rows_(scores, indices, sources, finite, usable)
    return list(zip(sources, finite, usable, strict=True))


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index (..., r)`` of ``x (..., m, n)``."""
    at = index.long().unsqueeze(-1)
    return x.gather(-2, at.expand(*at.shape[:-1], x.shape[-1]))
