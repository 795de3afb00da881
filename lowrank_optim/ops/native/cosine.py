"""Cosine transforms of columns by an FFT of the library's own; what it cannot take, by torch's."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import cosine as reference
from lowrank_optim.ops.native.arrays import Arrays, dtype_of, exactly, floating, on, same
from lowrank_optim.ops.native.loader import Cosine, Top, run
from lowrank_optim.ops.reference import top_rows_ as reference_top_rows_

BASES = {"dct2": 0, "dct3": 1}
RANKINGS = {"l2": 0, "l1": 1}
LARGEST_FACTOR = 61
"""Of a length: a stage of a larger prime would take more products than it is worth."""


@functools.cache
def takes_length(n: int) -> bool:
    """Whether columns of length ``n`` are transformed here."""
    for factor in range(2, LARGEST_FACTOR + 1):
        while n and n % factor == 0:
            n //= factor
    return n == 1


def _serves(xs: Sequence[Tensor]) -> bool:
    return xs[0].device.type == "cpu" and takes_length(xs[0].shape[0])


class _Call:
    """One call: all matrices of one length, each with its coefficients."""

    def __init__(self, like: Sequence[Tensor], plan: Sequence[Tensor], basis: str) -> None:
        self.arrays, n = Arrays(like[0].device), like[0].shape[0]
        turns = plan[-1]
        reference.check_name("basis", basis, [*BASES])
        if any(x.dim() != 2 or x.shape[0] != n for x in like):
            raise ValueError(f"cosines of one length, got {[tuple(x.shape) for x in like]}")
        exactly([turns], torch.float32, "turns")
        on(like[0].device, [turns])
        if turns.numel() != 2 * (n + n // 2 + 1):
            raise ValueError(f"a plan of another length than {n}")
        self.args: Any = Cosine(count=len(like), n=n, dtype=dtype_of(like, "matrices"))
        self.args.turns, self.args.basis = turns.data_ptr(), BASES[basis]
        self.args.cols = self.arrays.int64([x.shape[1] for x in like])
        self.like = like
        self.followed: list[tuple[Tensor, int, int]] = []

    def matrices(self, name: str, xs: Sequence[Tensor]) -> None:
        """``weights`` or ``grads``."""
        if xs is not self.like and [x.shape for x in xs] != [x.shape for x in self.like]:
            raise ValueError(f"{name}: {[tuple(x.shape) for x in xs]}")
        dtype_of([self.like[0], *xs], "matrices")
        setattr(self.args, name, self.arrays.pointers(xs))
        short = name[:-1]
        for d, side in enumerate(("rows", "cols")):
            setattr(self.args, f"{short}_{side}", self.arrays.int64([x.stride(d) for x in xs]))

    def index(self, indices: Sequence[Tensor]) -> None:
        """Coefficients of each."""
        same(len(self.like), indices=indices)
        exactly(indices, torch.int32, "indices")
        self.picked = [k.numel() for k in indices]
        self.followed += [(k, self.args.n, 0) for k in indices]
        self.args.index = self.arrays.pointers(indices)
        self.args.picked = self.arrays.int64(self.picked)

    def rows(self, name: str, xs: Sequence[Tensor]) -> None:
        """``(k, cols)`` of each: ``lows``, ``first``, ``second``."""
        same(len(self.like), **{name: xs})
        exactly(xs, torch.float32, name)
        for x, k, like in zip(xs, self.picked, self.like, strict=True):
            if x.shape != (k, like.shape[1]):
                raise ValueError(f"{name}: {tuple(x.shape)}, not {(k, like.shape[1])}")
        setattr(self.args, name, self.arrays.pointers(xs))

    def by_row(self, name: str, xs: Sequence[Tensor], dtype: torch.dtype) -> None:
        """``(k,)`` of each, where there are any."""
        if not xs:
            return
        same(len(self.like), **{name: xs})
        exactly(xs, dtype, name)
        if [x.numel() for x in xs] != self.picked:
            raise ValueError(f"{name}: {[x.numel() for x in xs]}, not {self.picked}")
        setattr(self.args, name, self.arrays.pointers(xs))
        if name == "source":
            self.followed += [(x, x.numel(), -1) for x in xs]

    def numbers(self, name: str, values: Sequence[float]) -> None:
        """One of each."""
        same(len(self.like), **{name: values})
        setattr(self.args, name, self.arrays.float32(values))

    def run(self, op: str) -> None:
        """Call it."""
        run(op, self.like[0].device, self.args, self.followed)


def cosine_scores(
    grads: Sequence[Tensor], plan: Sequence[Tensor], basis: str, ranking: str
) -> list[Tensor]:
    """``(m,)`` float32 of each; partial sums depend on the shape alone."""
    reference.check_name("ranking", ranking, [*RANKINGS])
    if grads and not _serves(grads):
        return reference.cosine_scores(grads, plan, basis, ranking)
    scores = [torch.empty(x.shape[0], dtype=torch.float32) for x in grads]
    if grads:
        call = _Call(grads, plan, basis)
        call.matrices("grads", grads)
        call.args.scores, call.args.norm = call.arrays.pointers(scores), RANKINGS[ranking]
        call.run("cosine_scores")
    return scores


def cosine_project_(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
) -> None:
    """Coefficients ``indices`` into ``outs (r, n)``."""
    if grads and not _serves(grads):
        reference.cosine_project_(grads, indices, outs, plan, basis)
    elif grads:
        call = _Call(grads, plan, basis)
        call.matrices("grads", grads)
        call.index(indices)
        call.rows("lows", outs)
        call.run("cosine_project")


def cosine_lift_add_(
    params: Sequence[Tensor],
    indices: Sequence[Tensor],
    updates: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
    decay: float,
    steps: Sequence[float],
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - step P N``; N is read in float32."""
    if params and not _serves(params):
        reference.cosine_lift_add_(params, indices, updates, plan, basis, decay, steps, finite)
        return
    if finite:
        same(len(params), indices=indices, updates=updates, steps=steps, finite=finite)
        ok = [i for i, flag in enumerate(finite) if flag]
        params, indices, updates = ([xs[i] for i in ok] for xs in (params, indices, updates))
        steps = [steps[i] for i in ok]
    if params:
        call = _Call(params, plan, basis)
        call.matrices("weights", params)
        call.index(indices)
        floating(updates, "updates")
        lows = [x.float().contiguous() for x in updates]  # alive until the call is over
        call.rows("lows", lows)
        call.numbers("steps", steps)
        call.args.decay = decay
        call.run("cosine_lift_add")


def cosine_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    steps: Sequence[float],
    plan: Sequence[Tensor],
    basis: str,
    decay: float,
) -> None:
    """A whole step, a tile of columns at a time: no spectrum, no direction in memory."""
    if params and not _serves(params):
        rows, moments = (row_eps, row_scale), (exp_avgs, exp_avg_sqs)
        reference.cosine_adamw_(
            params, grads, indices, sources, *moments, beta1, beta2, eps, *rows, steps, plan,
            basis, decay,
        )  # fmt: skip
    elif params:
        call = _Call(params, plan, basis)
        call.matrices("weights", params)
        call.matrices("grads", grads)
        call.index(indices)
        call.rows("first", exp_avgs)
        call.rows("second", exp_avg_sqs)
        call.by_row("source", sources, torch.int32)
        call.by_row("row_eps", row_eps, torch.float32)
        call.by_row("row_scale", row_scale, torch.float32)
        call.numbers("eps", eps)
        call.numbers("steps", steps)
        call.args.beta1, call.args.beta2, call.args.decay = beta1, beta2, decay
        call.run("cosine_adamw")


def top_rows_(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    finite: Sequence[Tensor] = (),
    usable: Sequence[Tensor] = (),
) -> None:
    """The largest by their bits, which are in order for numbers that are not negative."""
    if not scores:
        return
    if scores[0].device.type != "cpu":
        reference_top_rows_(scores, indices, sources, finite, usable)
        return
    same(len(scores), indices=indices, sources=sources)
    exactly(scores, torch.float32, "scores")
    exactly(indices, torch.int32, "indices")
    exactly(sources, torch.int32, "sources")
    picked = [x.numel() for x in indices]
    if picked != [x.numel() for x in sources]:
        raise ValueError(f"{picked} indices, {[x.numel() for x in sources]} sources")
    if any(k > x.numel() for k, x in zip(picked, scores, strict=True)):
        raise ValueError(f"{picked} of {[x.numel() for x in scores]} rows")
    arrays = Arrays(scores[0].device)
    args = Top(count=len(scores))
    args.scores, args.index = arrays.pointers(scores), arrays.pointers(indices)
    args.source = arrays.pointers(sources)
    args.rows, args.picked = arrays.int64([x.numel() for x in scores]), arrays.int64(picked)
    if finite or usable:  # csrc has none: of a CPU the host has looked
        same(len(scores), finite=finite, usable=usable)
        for name, told in (("finite", finite), ("usable", usable)):
            exactly(told, torch.bool, name)
            arrays.pointers(told)
        reference_top_rows_(scores, indices, sources, finite, usable)
        return
    run("top_rows", scores[0].device, args)
