"""The discrete cosine basis: no factorisation, r indices a matrix, and a fast transform."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.ops.cosine import CosineTransform, column_tiles, cosine_rows
from lowrank_optim.ops.devices import kind_of
from lowrank_optim.ops.stacked import empty_like_all, stacked
from lowrank_optim.rules.base import compute_dtype
from lowrank_optim.subspaces.base import State, register
from lowrank_optim.subspaces.fixed import SPECTRUM_ELEMENTS, Choice, FixedBasis, Spectrum
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView

TRANSFORMS = ("auto", "matmul", "fft")
FFT_COST: dict[tuple[str, torch.dtype], float] = {
    ("cpu", torch.float64): 48.0,
    ("cpu", torch.float32): 48.0,
    ("cpu", torch.bfloat16): 192.0,
    ("cpu", torch.float16): 192.0,
}
"""Rank at which a product with r columns takes as long as one transform in tiles."""
FUSED_COST = {torch.float32: (36, 24), torch.bfloat16: (160, 10), torch.float16: (160, 10)}
"""The same of kernels on the CPU: at most the first, and the length over the second if that is
less. Products of bfloat16 are those of a CPU that has instructions for them."""
FFT_COST_ACCELERATOR = 512.0
SLOW_LENGTH = 4.0
"""Factor of a length with a prime factor above 13."""


@register("dct")
@dataclass(frozen=True)
class DCT(FixedBasis):
    """The r cosines that hold most of the gradient, chosen among all of its dimension.

    Args:
        basis: "dct2", the rows of the DCT-II matrix (cosines), or "dct3", its columns (default:
            "dct2").
        transform: how it is evaluated. "matmul": products with r columns of the matrix. "fft": one
            real FFT of each row, whatever the rank; no matrix is kept. "auto" takes the one that
            costs less (default: "auto"). Both use the same basis.

    Differs from the release (ISTA-DASLab-Optimizers 1.1): there "matmul" means the columns and the
    fast mode the rows of the matrix, so that two modes are two methods, and the order of the
    indices is left to the sort.

    References:
        Modoranu et al. (2025), arXiv:2505.17967.
    """

    basis: str = "dct2"
    transform: str = "auto"

    def vectors(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Cosines, or the columns of their matrix."""
        return cosine_rows(n, self.basis, dtype, device)

    def fast(self, n: int, like: Tensor) -> bool:
        """Whether vectors of length ``n`` are transformed, not multiplied."""
        if self.transform != "auto":
            return self.transform == "fft"
        kind = kind_of(like)
        if kind == "cpu" and like.dtype in FUSED_COST and ops.fuses_cosine(like, n):
            most, share = FUSED_COST[like.dtype]
            cost = min(most, n / share)
        else:
            cost = FFT_COST.get((kind, like.dtype), FFT_COST_ACCELERATOR)
            cost *= SLOW_LENGTH if _largest_prime(n) > 13 else 1
        # a refresh takes a transform, or a product with all columns
        return (2 + 1 / self.update_proj_gap) * cost < 2 * self.rank + n / self.update_proj_gap

    def prepare(self, view: MatrixView, like: Tensor) -> None:
        """Build the matrices or the factors of the transforms."""
        for n in (view.m, view.n)[: 1 + self.two_sided]:
            if self.fast(n, like):
                self._plan(n, like)
            else:
                self._rows(n, like)

    def _variant(self) -> tuple[Any, ...]:
        return (self.basis,)

    def plan(self, n: int, like: Tensor) -> list[Tensor]:
        """What the ops need of the transform of vectors of length ``n``."""
        return self._plan(n, like).plan

    def _plan(self, n: int, like: Tensor) -> CosineTransform:
        dtype, device = compute_dtype(like.dtype), like.device
        key = ("fft", self.basis, n, dtype, device)
        plan: CosineTransform = self.shared.get(
            key, lambda: CosineTransform.make(n, self.basis, dtype, device)
        )
        return plan

    def fused(self, n: int, like: Tensor) -> bool:
        """Whether vectors of length ``n`` are transformed, and kernels read what comes of it."""
        return ops.fuses_cosine(like, n) and self.fast(n, like)

    def look(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scores say as much as the norm, and cost kernels one pass less than both."""
        if grad.dim() > 2 or not self.fused(grad.shape[0], grad):
            return super().look(grad)
        return self.look_at([grad])[0]

    def look_at(self, grads: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """:meth:`look` of several of one shape, fused."""
        if not grads:
            return []
        plan = self.plan(grads[0].shape[0], grads[0])
        scores = ops.cosine_scores(grads, plan, self.basis, self.ranking)
        return list(zip(stacked(scores).sum(1).unbind(0), scores, strict=True))

    def looking(self, grad: Tensor) -> Searching[tuple[Tensor | None, Any]]:
        """Nothing, where one op looks, chooses and takes coordinates."""
        if self._shares(grad) and self._takes_at_once(grad):
            return None, None
        return (yield from super().looking(grad))

    def _takes_at_once(self, grad: Tensor) -> bool:
        """Whether every step chooses, on one side, among what kernels transform."""
        once = self.update_proj_gap == 1 and not self.two_sided
        return once and self.fused(grad.shape[0], grad)

    def _choosing(self, index: Tensor, grad: Tensor, seen: Any) -> Searching[Choice]:
        if seen is not None or not self._takes_at_once(grad):
            return (yield from super()._choosing(index, grad, seen))
        chosen: Choice = yield Ask(_top_coords_, (grad, index), (self,), listed=True)
        return chosen

    def _spectra(self, grads: Sequence[Tensor]) -> list[Spectrum]:
        n = grads[0].shape[0]
        if not self.fast(n, grads[0]):
            return super()._spectra(grads)
        if self.fused(n, grads[0]):
            plan = self.plan(n, grads[0])
            scores = ops.cosine_scores([*grads], plan, self.basis, self.ranking)
            return [Spectrum(own) for own in scores]
        keep, found = len(grads) * grads[0].numel() <= SPECTRUM_ELEMENTS, []
        for grad in grads:
            own, parts = self._scores(grad)
            found.append(Spectrum(own, None, parts if keep else ()))
        return found

    def _scores(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        if grad.dim() > 2 or not self.fused(grad.shape[0], grad):
            return super()._scores(grad)
        return self.look_at([grad])[0][1], []

    def _analyse(self, x: Tensor) -> Tensor:
        if not self.fast(x.shape[0], x):
            return super()._analyse(x)
        return self._plan(x.shape[0], x).analyse(x)

    def _in_order(self, like: Tensor, scores: Tensor) -> Tensor:
        if not self.fast(like.shape[0], like):
            return scores
        return scores[self._plan(like.shape[0], like).slots]

    def _take(self, like: Tensor, part: Tensor, index: Tensor) -> Tensor:
        if not self.fast(like.shape[0], like):
            return super()._take(like, part, index)
        return self._plan(like.shape[0], like).take(part, index)

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """``P^T G (Q)``: the chosen coefficients of transforms in tiles, or products."""
        lows = self._project([state["basis_index"] for state in states], grads)
        if self.two_sided:
            for n, (state, grad) in enumerate(zip(states, grads, strict=True)):
                index, low = state["basis_index_right"], lows[n]
                if self.columns is not None:
                    lows[n] = low @ self._right(grad, index).to(low.dtype)
                else:
                    lows[n] = self._project([index], [low.mT])[0].mT
        return [{"low": low} for low in lows]

    def _project(self, indices: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        """``P^T x (..., r, n)`` of each ``x (..., m, n)``."""
        m, n = xs[0].shape[-2:]
        if not self.fast(m, xs[0]):
            bases = self._columns(xs[0], stacked(indices)).to(xs[0].dtype).unbind(0)
            outs: Sequence[Tensor | None] = [None] * len(xs)
            if len(xs) > 1 and xs[0].dim() == 2:
                outs = empty_like_all(xs, (self.rank, n), ops.product_dtype(xs[0].dtype))
            return [ops.project(p, x, out) for p, x, out in zip(bases, xs, outs, strict=True)]
        plan = self._plan(m, xs[0])
        lows = empty_like_all(xs, (*xs[0].shape[:-2], self.rank, n), plan.sign.dtype)
        lists: Sequence[Sequence[Tensor]] = xs, indices, lows
        if xs[0].dim() > 2:
            lists = [[own for x in each for own in x.unbind(0)] for each in lists]
        ops.cosine_project_(*map(list, lists), plan.plan, self.basis)
        return lows

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """``W <- decay W - lr (scale P N (Q^T) + term)``, tiles of columns at a time."""
        if not self.fast(intos[0].param.shape[-2], intos[0].param):
            yield from super().push_all_(intos, states, updates, terms)
            return
        plain: dict[float, list[_Plain]] = {}
        for n, (into, state, update, term) in enumerate(
            zip(intos, states, updates, terms, strict=True)
        ):
            low, index = self._widened(update["low"], state, into.param), state["basis_index"]
            if term is None and isinstance(into.decay, float) and into.rounding is None:
                parts = [into.param], [index], [low]
                if into.param.dim() > 2:
                    parts = [*into.param.unbind(0)], [*index.unbind(0)], [*low.unbind(0)]
                own = [_Plain(n, into, *each) for each in zip(*parts, strict=True)]
                plain.setdefault(into.decay, []).extend(own)
            else:
                self._push_tiles_(into, state, low, term)
                yield n
        for decay, alike in plain.items():
            numbers, owners, params, indices, lows = map(list, zip(*alike, strict=True))
            plan = self.plan(params[0].shape[0], params[0])
            rates = [into.lr * self.scale for into in owners]
            finite = [into.finite for into in owners if into.finite is not None]
            ops.cosine_lift_add_(params, indices, lows, plan, self.basis, decay, rates, finite)
            yield from dict.fromkeys(numbers)

    def takes_step(self, param: Tensor, term: Term | None) -> bool:
        """Where a product lifts, and no transform."""
        return not self.fast(param.shape[-2], param) and super().takes_step(param, term)

    def _push_tiles_(self, into: Target, state: State, low: Tensor, term: Term | None) -> None:
        """With a term, a factor on the device, or stochastic rounding."""
        seen, index, decay = into.low, state["basis_index"], into.guarded_decay()
        if self.two_sided:
            seen = None if term is None or seen is None else self._widened(seen, state, into.param)
        for n, (param, grad, own, x, y) in enumerate(_matrices(into, index, low, seen)):
            own_decay = decay
            if isinstance(decay, Tensor) and decay.dim() > 0:
                own_decay = decay.reshape(-1)[n if decay.numel() > 1 else 0]
            noise = into.rounding
            if noise is not None and param is not into.param:
                noise = noise.select(n)
            one = into._replace(param=param, grad=grad, low=y, decay=own_decay, rounding=noise)
            columns = None
            if term is not None and term.columns is not None:
                columns = term.columns if param is into.param else term.columns[n]
            self._push_one_(one, own.long(), x, term, columns)

    def _widened(self, low: Tensor, state: State, param: Tensor) -> Tensor:
        """``N Q^T (..., r, n)`` of ``N (..., r, r)``; N itself of one side."""
        if not self.two_sided:
            return low
        n, index = param.shape[-1], state["basis_index_right"]
        if self.columns is not None or not self.fast(n, param):
            wide = low.to(compute_dtype(low.dtype))
            return wide @ self._right(param, index).mT.to(wide.dtype)
        plan = self._plan(n, param)
        if low.dim() == 2:
            return plan.lift(low.mT, index.long())
        pairs = zip(low.unbind(0), index.unbind(0), strict=True)
        return torch.stack([plan.lift(x.mT, i.long()) for x, i in pairs])

    def _push_one_(
        self, into: Target, index: Tensor, low: Tensor, term: Term | None, columns: Tensor | None
    ) -> None:
        plan = self._plan(into.param.shape[0], into.param)
        for at in column_tiles(into.param):
            if term is None:
                step, size = plan.lift(low[:, at], index), into.lr * self.scale
            else:
                step = self._with_term(plan, into, index, low[:, at], at, term, columns)
                size = into.lr
            weights = into.param.mT[at]
            if weights.dtype == step.dtype:
                if not (isinstance(into.decay, float) and into.decay == 1):
                    weights.mul_(into.decay)
                weights.add_(step, alpha=-size)
            else:
                new = weights.to(step.dtype).mul_(into.decay).add_(step, alpha=-size)
                noise = None if into.rounding is None else into.rounding.mT.narrow(0, at.start)
                ops.put_(weights, new, noise)

    def _with_term(
        self,
        plan: CosineTransform,
        into: Target,
        index: Tensor,
        low: Tensor,
        at: slice,
        term: Term,
        columns: Tensor | None,
    ) -> Tensor:
        """What a tile of the transposed weights moves by, the residual's share included."""
        assert into.low is not None
        grad, seen = into.grad.mT[at].to(plan.sign.dtype), into.low[:, at]
        if into.finite is not None:
            grad = torch.where(into.finite, grad, 0)
            seen = torch.where(into.finite, seen, 0)
        if term.kind == "scaled":
            assert columns is not None
            factor = columns[:, at]
            if into.finite is not None:
                factor = torch.where(into.finite, factor, 0)
            inside = plan.lift(self.scale * (low - seen * factor), index)
            return inside.addcmul_(grad, factor.mT.to(grad.dtype))
        outside = term.of_(grad - plan.lift(seen, index))
        return plan.lift(low, index).mul_(self.scale).add_(outside)


def _top_coords_(grads: list[Tensor], indices: list[Tensor], subspace: DCT) -> list[Choice]:
    """Write new indices, and transform each gradient once for them and for its coordinates."""
    n, grad = grads[0].shape[1], grads[0]
    sources = empty_like_all(indices, indices[0].shape, indices[0].dtype)
    finite, usable = (empty_like_all(grads, (), torch.bool) for _ in range(2))
    lows = empty_like_all(grads, (subspace.rank, n), compute_dtype(grad.dtype))
    plan = subspace.plan(grad.shape[0], grad)
    told = sources, finite, usable
    ops.cosine_top_project_(grads, indices, *told, lows, plan, subspace.basis, subspace.ranking)
    return list(map(Choice, *told, lows))


class _Plain(NamedTuple):
    """A matrix for the op that takes all at once."""

    number: int
    """Of its parameter in the bucket."""
    into: Target
    param: Tensor
    chosen: Tensor
    low: Tensor


def _matrices(
    into: Target, index: Tensor, low: Tensor, seen: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """Each matrix of a batch with what belongs to it."""
    if into.param.dim() == 2:
        yield into.param, into.grad, index, low, seen
        return
    for n in range(into.param.shape[0]):
        y = None if seen is None else seen[n]
        yield into.param[n], into.grad[n], index[n], low[n], y


@functools.cache
def _largest_prime(n: int) -> int:
    """The largest prime factor of ``n``."""
    factor, largest = 2, 1
    while factor * factor <= n:
        while n % factor == 0:
            n, largest = n // factor, factor
        factor += 1
    return max(largest, n)
