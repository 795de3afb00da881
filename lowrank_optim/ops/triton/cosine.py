"""The cosine ops: torch's FFT of reals between two kernels of ``cosine_kernels.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.cosine import (
    BASES,
    RANKINGS,
    SPAN,
    check_name,
    column_tiles,
    move_rows_,
    together,
    whole_at_once,
)
from lowrank_optim.ops.devices import on_accelerator
from lowrank_optim.ops.triton.cosine_kernels import (
    cosine_add_kernel,
    cosine_fold_kernel,
    cosine_pick_kernel,
    cosine_place_kernel,
    cosine_score_kernel,
)
from lowrank_optim.ops.triton.direction import adamw_direction_
from lowrank_optim.ops.triton.launch import (
    cdiv,
    float_bits,
    groups,
    guard,
    launch,
    warps,
)
from lowrank_optim.ops.triton.matrices import wide
from lowrank_optim.ops.triton.rows import top_rows_

COLUMNS, PAIRS = 64, 32
"""Tile: 64 columns are a full line of a row-major bfloat16 matrix, 32 pairs one of reals and two of
a spectrum. With 4 warps a lane has 16 pairs."""
PICKED_COLUMNS, PICKED_ROWS = 32, 64
PLACES = 256
"""Coefficients that one program looks up."""


class _Transform:
    """The transforms of one length: what a call launches around them."""

    def __init__(self, m: int, plan: Sequence[Tensor], basis: str) -> None:
        check_name("basis", basis, BASES)
        *_, twiddle, untwiddle, _ = plan
        if twiddle.numel() != m // 2 + 1 or twiddle.dtype != torch.complex64:
            raise ValueError(f"a plan of another length than {m}, or of another dtype")
        self.m, self.cosines = m, basis == "dct2"
        self.twiddle, self.untwiddle = twiddle.view(torch.int64), untwiddle.view(torch.int64)

    def programs(self, n: int, mirror: bool, columns: int = COLUMNS) -> int:
        """How many take the pairs and columns of one matrix."""
        pairs = self.m // 2 + 1 if mirror else (self.m + 1) // 2
        return cdiv(pairs, PAIRS) * cdiv(n, columns)

    def places(self, indices: Sequence[Tensor]) -> list[Tensor]:
        """``(m,)`` each: the row of what has rows ``index (r,)``, -1 for none."""
        rank, count = indices[0].shape[0], len(indices)
        out = torch.empty(count, self.m, dtype=torch.int32, device=indices[0].device)
        launch(
            cosine_place_kernel, [[x.contiguous() for x in indices], out.unbind(0)], [],
            [cdiv(self.m, PLACES)] * count, self.m, rank,
            PROBES=rank.bit_length(), BLOCK=PLACES, num_warps=warps(4),
        )  # fmt: skip
        return list(out.unbind(0))

    def run(self, xs: Sequence[Tensor], places: Sequence[Tensor], mirror: bool) -> list[Tensor]:
        """``(n, m // 2 + 1)`` in 64 bits of each: the spectra of columns of ``x (m, n)``.

        Or of rows of it put in ``places``. Rows are folded, or with ``mirror`` mirrored. One
        transform is that of all.
        """
        m, n, count = self.m, xs[0].shape[1], len(xs)
        out = torch.empty(count, n, m, dtype=torch.float32, device=xs[0].device)
        launch(
            cosine_fold_kernel, [xs, places, out.unbind(0)], [], [self.programs(n, mirror)] * count,
            self.untwiddle, m, n, *xs[0].stride(), 1 / m,
            MIRROR=mirror, DOWN=not places and xs[0].stride(0) == 1,
            PICKED=len(places) > 0, WIDE=wide(2 * PAIRS, xs[0]),
            BC=COLUMNS, BQ=PAIRS, num_warps=warps(4),
        )  # fmt: skip
        return list(torch.fft.rfft(out).contiguous().view(torch.int64).unbind(0))

    def analysed(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Spectra of the columns of each: coefficients are mirrored rows of cosines, or folded."""
        return self.run(xs, [], not self.cosines)

    def score_(self, parts: Sequence[Tensor], outs: Sequence[Tensor], ranking: str) -> None:
        """Sums of every ``SPAN`` columns of what :meth:`analysed` left, each a row of its own.

        They are added up in order afterwards: no atomics.
        """
        n = parts[0].shape[0]
        launch(
            cosine_score_kernel, [parts, outs], [],
            [self.programs(n, self.cosines, SPAN)] * len(parts), self.twiddle, self.m, n,
            MIRROR=self.cosines, L1=ranking == "l1", SPAN=SPAN, BC=COLUMNS, BQ=PAIRS,
            num_warps=warps(4),
        )  # fmt: skip

    def pick_(
        self, parts: Sequence[Tensor], indices: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> None:
        """Coefficients ``indices (r,)`` of what :meth:`analysed` left into ``outs (r, n)``."""
        n, rank = parts[0].shape[0], indices[0].shape[0]
        if not rank:
            return
        programs = cdiv(rank, PICKED_ROWS) * cdiv(n, PICKED_COLUMNS)
        launch(
            cosine_pick_kernel, [parts, indices, outs], [], [programs] * len(parts),
            self.twiddle, self.m, n, rank, outs[0].stride(0),
            MIRROR=self.cosines, BC=PICKED_COLUMNS, BR=PICKED_ROWS, num_warps=warps(4),
        )  # fmt: skip


class _Sums:
    """Rows of scores ``(m,)``: what programs add up of every ``SPAN`` columns of a tile."""

    def __init__(self, grad: Tensor, count: int) -> None:
        m, tiles = grad.shape[0], list(column_tiles(grad))
        self.width = tiles[0].stop  # the first tile is the widest
        self.each = cdiv(self.width, SPAN)
        rows = (len(tiles) - 1) * self.each + cdiv(tiles[-1].stop - tiles[-1].start, SPAN)
        self.all = torch.empty(count, rows, m, dtype=torch.float32, device=grad.device)
        self.own = self.all.unbind(0)

    def of(self, at: range, columns: slice) -> list[Tensor]:
        """Where those of a tile go, of matrices by their places."""
        row = columns.start // self.width * self.each
        return [self.own[i][row:] for i in at]

    def total(self) -> tuple[Tensor, ...]:
        """Scores of each matrix."""
        return self.all.sum(1).unbind(0)


def _alike(*lists: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of matrices that share a launch: of one shape and strides, which it is given."""
    keys = [tuple((x.shape, x.stride()) for x in own) for own in zip(*lists, strict=True)]
    return groups(lists, keys)


def _tiles(xs: Sequence[Tensor]) -> Iterator[tuple[range, slice]]:
    """Places of alike matrices, and which of their columns, that are transformed at once."""
    count = together(xs[0])
    for start in range(0, len(xs), count):
        for columns in column_tiles(xs[0]):
            yield range(start, min(start + count, len(xs))), columns


def cosine_scores(
    grads: Sequence[Tensor], plan: Sequence[Tensor], basis: str, ranking: str
) -> list[Tensor]:
    """``(m,)`` of each: sums of squares ("l2") or of absolute values ("l1") of coefficients."""
    check_name("ranking", ranking, RANKINGS)
    found = [x.new_zeros(x.shape[0], dtype=torch.float32) if not x.numel() else x for x in grads]
    for at in _alike(grads):
        own = [grads[i] for i in at]
        transform, sums = _Transform(own[0].shape[0], plan, basis), _Sums(own[0], len(own))
        with guard(own[0]):
            for some, columns in _tiles(own):
                parts = transform.analysed([own[i][:, columns] for i in some])
                transform.score_(parts, sums.of(some, columns), ranking)
                del parts  # the next tile's come before these would go
        for i, scores in zip(at, sums.total(), strict=True):
            found[i] = scores
    return found


def cosine_project_(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
) -> None:
    """Coefficients ``indices (r,)`` of the columns of ``grads (m, n)`` into ``outs (r, n)``."""
    for at in _alike(outs, grads, indices):
        own, index = [grads[i] for i in at], [indices[i].contiguous() for i in at]
        transform = _Transform(own[0].shape[0], plan, basis)
        with guard(own[0]):
            for some, columns in _tiles(own):
                parts = transform.analysed([own[i][:, columns] for i in some])
                lows = [outs[at[i]][:, columns] for i in some]
                transform.pick_(parts, [index[i] for i in some], lows)
                del parts


def cosine_top_project_(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    finite: Sequence[Tensor],
    usable: Sequence[Tensor],
    outs: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
    ranking: str,
) -> None:
    """The coefficients with the largest scores, of one transform where all of it can be kept."""
    check_name("ranking", ranking, RANKINGS)
    lists = grads, indices, sources, finite, usable, outs
    none = [i for i, x in enumerate(grads) if not x.numel()]
    if none:  # scores of 0, of which nothing is chosen
        zeros = [grads[i].new_zeros(grads[i].shape[0], dtype=torch.float32) for i in none]
        top_rows_(zeros, *([own[i] for i in none] for own in lists[1:-1]))
    for at in _alike(*lists):
        x, *others = ([own[i] for i in at] for own in lists)
        count = whole_at_once(*x[0].shape, on_accelerator(x[0]))
        if not count:
            *told, lows = others
            top_rows_(cosine_scores(x, plan, basis, ranking), *told)
            cosine_project_(x, told[0], lows, plan, basis)
            continue
        transform = _Transform(x[0].shape[0], plan, basis)
        for start in range(0, len(x), count):
            some = [own[start : start + count] for own in (x, *others)]
            with guard(x[0]):
                _top_project_(transform, *some, ranking)


def _top_project_(
    transform: _Transform,
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    finite: Sequence[Tensor],
    usable: Sequence[Tensor],
    outs: Sequence[Tensor],
    ranking: str,
) -> None:
    """Of some alike matrices, whose transforms are kept until their coefficients are known."""
    sums, tiles, every = _Sums(grads[0], len(grads)), [], range(len(grads))
    for columns in column_tiles(grads[0]):
        parts = transform.analysed([x[:, columns] for x in grads])
        transform.score_(parts, sums.of(every, columns), ranking)
        tiles.append((columns, parts))
    top_rows_(sums.total(), indices, sources, finite, usable)
    for columns, parts in tiles:
        transform.pick_(parts, indices, [x[:, columns] for x in outs])


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
    """``W <- decay W - step P N``; where ``finite`` is False, W is left as it is."""
    for at in _alike(params, indices, updates):
        own = [params[i] for i in at]
        first, transform = own[0], _Transform(own[0].shape[0], plan, basis)
        mirror = not transform.cosines
        with guard(first):
            placed = transform.places([indices[i] for i in at])
            for some, columns in _tiles(own):
                lows = [updates[at[i]][:, columns] for i in some]
                xs = transform.run(lows, [placed[i] for i in some], not mirror)
                flags = [finite[at[i]] for i in some] if finite else []
                lists = [own[i][:, columns] for i in some], xs, flags
                n = xs[0].shape[0]
                launch(
                    cosine_add_kernel, lists, [[float_bits(steps[at[i]]) for i in some]],
                    [transform.programs(n, mirror)] * len(some),
                    transform.twiddle, transform.m, n, *first.stride(), decay,
                    MIRROR=mirror, DOWN=first.stride(0) == 1,
                    WIDE=wide(2 * PAIRS, first), SOUND=len(finite) > 0,
                    BC=COLUMNS, BQ=PAIRS, num_warps=warps(4),
                )  # fmt: skip
                del xs, lists


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
    """Coefficients, AdamW on moments whose rows come from ``sources``, and the lift, in turn."""
    for i, source in enumerate(sources):
        move_rows_((exp_avgs[i], exp_avg_sqs[i]), source)
    lows = [torch.empty_like(x) for x in exp_avgs]
    cosine_project_(grads, indices, lows, plan, basis)
    rows = row_eps, row_scale
    adamw_direction_(lows, exp_avgs, exp_avg_sqs, lows, beta1, beta2, eps, *rows, [])
    cosine_lift_add_(params, indices, lows, plan, basis, decay, steps)
