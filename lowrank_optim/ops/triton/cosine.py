"""The cosine ops: torch's FFT between two kernels of ``cosine_kernels.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lowrank_optim.ops.cosine import BASES, RANKINGS, check_name, column_tiles, move_rows_
from lowrank_optim.ops.reference import top_rows_  # noqa: F401  (not a kernel)
from lowrank_optim.ops.triton.cosine_kernels import (
    cosine_add_kernel,
    cosine_fold_kernel,
    cosine_pick_kernel,
    cosine_place_kernel,
    cosine_score_kernel,
)
from lowrank_optim.ops.triton.direction import adamw_direction_
from lowrank_optim.ops.triton.launch import flags, guard, warps
from lowrank_optim.ops.triton.matrices import wide

COLUMNS, PAIRS = 32, 64
"""Tile: 32 columns are a full line of a row-major float32 matrix, 64 pairs half a KiB of a
spectrum. With 4 warps a lane has 16 pairs."""
SPAN = 128
"""Columns that one program of the scores adds up: fixed, so that sums are the same everywhere."""
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

    def programs(self, n: int, half: bool, columns: int = COLUMNS) -> tuple[int]:
        """The grid over pairs and columns."""
        pairs = self.m // 2 + 1 if half else (self.m + 1) // 2
        return (triton.cdiv(pairs, PAIRS) * triton.cdiv(n, columns),)

    def places(self, index: Tensor) -> Tensor:
        """``(m,)``: the row of what has rows ``index (r,)``, -1 for none."""
        rank = index.shape[0]
        out = torch.empty(self.m, dtype=torch.int32, device=index.device)
        cosine_place_kernel[(triton.cdiv(self.m, PLACES),)](
            index.contiguous(), out, self.m, rank, DEPTH=rank.bit_length(), BLOCK=PLACES,
            num_warps=warps(4),
        )  # fmt: skip
        return out

    def run(self, x: Tensor, places: Tensor | None, half: bool) -> Tensor:
        """The columns of ``x (m, n)``, or of rows of it put in ``places``, transformed.

        With ``half`` they are taken for spectra, and ``(n, m)`` float32 come back; else the other
        way round, ``(n, m // 2 + 1)`` in 64 bits.
        """
        m, n = self.m, x.shape[1]
        width, dtype = (m // 2 + 1, torch.int64) if half else (m, torch.float32)
        out = torch.empty(n, width, dtype=dtype, device=x.device)
        cosine_fold_kernel[self.programs(n, half)](
            x, places, out, self.untwiddle, m, n, *x.stride(), 1 / m,
            HALF=half, PICKED=places is not None, WIDE=wide(2 * PAIRS, x),
            BC=COLUMNS, BQ=PAIRS, num_warps=warps(4), enable_fp_fusion=False,
        )  # fmt: skip
        if half:  # its 1 / m is in the turns: torch would pass over the result once more
            spectrum = out.view(torch.complex64)
            return torch.fft.irfft(spectrum, n=m, norm="forward").contiguous()
        return torch.fft.rfft(out).contiguous().view(torch.int64)


def _analysed(transform: _Transform, x: Tensor) -> tuple[Tensor, bool]:
    """All coefficients of the columns of x as they fall, and whether as half a spectrum."""
    half = transform.cosines
    return transform.run(x, None, not half), half


def cosine_scores(
    grads: Sequence[Tensor], plan: Sequence[Tensor], basis: str, ranking: str
) -> list[Tensor]:
    """``(m,)`` of each: sums of squares ("l2") or of absolute values ("l1") of coefficients.

    Programs write their sums in rows of their own, added up in order afterwards: no atomics.
    """
    check_name("ranking", ranking, RANKINGS)
    found = []
    for grad in grads:
        m = grad.shape[0]
        if not grad.numel():
            found.append(grad.new_zeros(m, dtype=torch.float32))
            continue
        transform, tiles = _Transform(m, plan, basis), list(column_tiles(grad))
        each = triton.cdiv(tiles[0].stop, SPAN)  # the first tile is the widest
        rows = (len(tiles) - 1) * each + triton.cdiv(tiles[-1].stop - tiles[-1].start, SPAN)
        sums = torch.empty(rows, m, dtype=torch.float32, device=grad.device)
        with guard(grad):
            for t, columns in enumerate(tiles):
                x = grad[:, columns]
                parts, half = _analysed(transform, x)
                cosine_score_kernel[transform.programs(x.shape[1], half, SPAN)](
                    parts, transform.twiddle, sums[t * each :], m, x.shape[1],
                    HALF=half, L1=ranking == "l1", SPAN=SPAN, BC=COLUMNS, BQ=PAIRS,
                    num_warps=warps(4), enable_fp_fusion=False,
                )  # fmt: skip
            found.append(sums.sum(0))
    return found


def cosine_project_(
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    outs: Sequence[Tensor],
    plan: Sequence[Tensor],
    basis: str,
) -> None:
    """Coefficients ``indices (r,)`` of the columns of ``grads (m, n)`` into ``outs (r, n)``."""
    for grad, index, out in zip(grads, indices, outs, strict=True):
        if not out.numel():
            continue
        transform, rank = _Transform(grad.shape[0], plan, basis), index.shape[0]
        index = index.contiguous()
        with guard(grad):
            for columns in column_tiles(grad):
                parts, half = _analysed(transform, grad[:, columns])
                n = parts.shape[0]
                programs = triton.cdiv(rank, PICKED_ROWS) * triton.cdiv(n, PICKED_COLUMNS)
                cosine_pick_kernel[(programs,)](
                    parts, transform.twiddle, index, out[:, columns],
                    transform.m, n, rank, out.stride(0),
                    HALF=half, BC=PICKED_COLUMNS, BR=PICKED_ROWS,
                    num_warps=warps(4), enable_fp_fusion=False,
                )  # fmt: skip


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
    fine = flags(finite) or [None] * len(params)
    for w, index, low, step, flag in zip(params, indices, updates, steps, fine, strict=True):
        if not w.numel():
            continue
        transform = _Transform(w.shape[0], plan, basis)
        half = not transform.cosines
        with guard(w):
            places = transform.places(index)
            for columns in column_tiles(w):
                x = transform.run(low[:, columns], places, not half)
                own = w[:, columns]
                cosine_add_kernel[transform.programs(own.shape[1], half)](
                    own, x, transform.twiddle, flag, transform.m, own.shape[1],
                    *own.stride(), decay, step,
                    HALF=half, WIDE=wide(2 * PAIRS, w), SOUND=flag is not None,
                    BC=COLUMNS, BQ=PAIRS, num_warps=warps(4), enable_fp_fusion=False,
                )  # fmt: skip


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
    for i, (w, grad, index) in enumerate(zip(params, grads, indices, strict=True)):
        moments = exp_avgs[i], exp_avg_sqs[i]
        if sources:
            move_rows_(moments, sources[i])
        low = torch.empty_like(moments[0])
        cosine_project_([grad], [index], [low], plan, basis)
        own = row_eps[i : i + 1], row_scale[i : i + 1]
        adamw_direction_([low], [moments[0]], [moments[1]], [low], beta1, beta2, [eps[i]], *own, [])
        cosine_lift_add_([w], [index], [low], plan, basis, decay, [steps[i]])
