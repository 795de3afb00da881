"""The cosine ops: torch's FFT between two kernels of ``cosine_kernels.py``."""

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
)
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
    select,
    warps,
)
from lowrank_optim.ops.triton.matrices import wide

COLUMNS, PAIRS = 64, 32
"""Tile: 64 columns are a full line of a row-major bfloat16 matrix, 32 pairs one of folded reals and
two of a spectrum. With 4 warps a lane has 16 pairs."""
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

    def programs(self, n: int, half: bool, columns: int = COLUMNS) -> int:
        """How many take the pairs and columns of one matrix."""
        pairs = self.m // 2 + 1 if half else (self.m + 1) // 2
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

    def run(self, xs: Sequence[Tensor], places: Sequence[Tensor], half: bool) -> list[Tensor]:
        """The columns of each ``x (m, n)``, or of rows of it put in ``places``, transformed.

        With ``half`` they are taken for spectra, and ``(n, m)`` float32 come back; else the other
        way round, ``(n, m // 2 + 1)`` in 64 bits. One transform is that of all.
        """
        m, n, count = self.m, xs[0].shape[1], len(xs)
        width, dtype = (m // 2 + 1, torch.int64) if half else (m, torch.float32)
        out = torch.empty(count, n, width, dtype=dtype, device=xs[0].device)
        launch(
            cosine_fold_kernel, [xs, places, out.unbind(0)], [], [self.programs(n, half)] * count,
            self.untwiddle, m, n, *xs[0].stride(), 1 / m,
            HALF=half, DOWN=not places and xs[0].stride(0) == 1,
            PICKED=len(places) > 0, WIDE=wide(2 * PAIRS, xs[0]),
            BC=COLUMNS, BQ=PAIRS, num_warps=warps(4),
        )  # fmt: skip
        if half:  # its 1 / m is in the turns: torch would pass over the result once more
            spectrum = out.view(torch.complex64)
            found = torch.fft.irfft(spectrum, n=m, norm="forward").contiguous()
        else:
            found = torch.fft.rfft(out).contiguous().view(torch.int64)
        return list(found.unbind(0))

    def analysed(self, xs: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """All coefficients of the columns of each as they fall; whether as half a spectrum."""
        return self.run(xs, [], not self.cosines), self.cosines


def _alike(*lists: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of matrices that share a launch: of one shape and strides, which it is given."""
    keys = [tuple((x.shape, x.stride()) for x in own) for own in zip(*lists, strict=True)]
    return groups(lists, keys)


def _tiles(at: Sequence[int], x: Tensor) -> Iterator[tuple[Sequence[int], slice]]:
    """Which matrices like ``x``, and which of their columns, are transformed at once."""
    count = together(x)
    for start in range(0, len(at), count):
        for columns in column_tiles(x):
            yield at[start : start + count], columns


def cosine_scores(
    grads: Sequence[Tensor], plan: Sequence[Tensor], basis: str, ranking: str
) -> list[Tensor]:
    """``(m,)`` of each: sums of squares ("l2") or of absolute values ("l1") of coefficients.

    Programs write their sums in rows of their own, added up in order afterwards: no atomics.
    """
    check_name("ranking", ranking, RANKINGS)
    found = [x.new_zeros(x.shape[0], dtype=torch.float32) if not x.numel() else x for x in grads]
    for at in _alike(grads):
        grad = grads[at[0]]
        m, tiles = grad.shape[0], list(column_tiles(grad))
        transform = _Transform(m, plan, basis)
        each = cdiv(tiles[0].stop, SPAN)  # the first tile is the widest
        rows = (len(tiles) - 1) * each + cdiv(tiles[-1].stop - tiles[-1].start, SPAN)
        sums = torch.empty(len(at), rows, m, dtype=torch.float32, device=grad.device)
        own = dict(zip(at, sums.unbind(0), strict=True))
        with guard(grad):
            for some, columns in _tiles(at, grad):
                parts, half = transform.analysed([grads[i][:, columns] for i in some])
                n, row = parts[0].shape[0], columns.start // tiles[0].stop * each
                launch(
                    cosine_score_kernel, [parts, [own[i][row:] for i in some]], [],
                    [transform.programs(n, half, SPAN)] * len(some), transform.twiddle, m, n,
                    HALF=half, L1=ranking == "l1", SPAN=SPAN, BC=COLUMNS, BQ=PAIRS,
                    num_warps=warps(4),
                )  # fmt: skip
                del parts  # the next tile's come before these would go
        for i, scores in zip(at, sums.sum(1).unbind(0), strict=True):
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
        grad, out, rank = grads[at[0]], outs[at[0]], indices[at[0]].shape[0]
        transform = _Transform(grad.shape[0], plan, basis)
        index = {i: indices[i].contiguous() for i in at}
        with guard(grad):
            for some, columns in _tiles(at, grad):
                parts, half = transform.analysed([grads[i][:, columns] for i in some])
                n = parts[0].shape[0]
                programs = cdiv(rank, PICKED_ROWS) * cdiv(n, PICKED_COLUMNS)
                lists = parts, [index[i] for i in some], [outs[i][:, columns] for i in some]
                launch(
                    cosine_pick_kernel, lists, [], [programs] * len(some),
                    transform.twiddle, transform.m, n, rank, out.stride(0),
                    HALF=half, BC=PICKED_COLUMNS, BR=PICKED_ROWS, num_warps=warps(4),
                )  # fmt: skip
                del parts, lists


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
        first = params[at[0]]
        transform = _Transform(first.shape[0], plan, basis)
        half = not transform.cosines
        with guard(first):
            placed = dict(zip(at, transform.places([indices[i] for i in at]), strict=True))
            for some, columns in _tiles(at, first):
                lows = [updates[i][:, columns] for i in some]
                xs = transform.run(lows, [placed[i] for i in some], not half)
                lists = [params[i][:, columns] for i in some], xs, *select([finite], some)
                n = xs[0].shape[0]
                launch(
                    cosine_add_kernel, lists, [[float_bits(steps[i]) for i in some]],
                    [transform.programs(n, half)] * len(some),
                    transform.twiddle, transform.m, n, *first.stride(), decay,
                    HALF=half, DOWN=first.stride(0) == 1,
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
