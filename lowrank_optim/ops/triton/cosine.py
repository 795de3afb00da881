"""What is around the FFT of a cosine transform, in one pass before it and one after it.

torch transforms (cuFFT, rocFFT, MKL); kernels turn, reorder, twiddle, add up, pick and apply. Both
orders that a transform needs pair rows of the matrix, and a program reads or writes both of a pair:

* folded, as the FFT takes or leaves reals: rows 2q and 2q + 1 are entries q and m - 1 - q;
* half a spectrum, as it takes or leaves complex numbers: rows q and m - q are the real part of
  entry q, turned, and its imaginary part, with the other sign.

So rows that are stored together are read together, no table of places is read, and a spectrum is
written whole, zeros included: nothing is scattered, and no two programs write one entry.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.cosine import column_tiles, move_rows_
from lowrank_optim.ops.reference import top_rows_  # noqa: F401  (not a kernel)
from lowrank_optim.ops.triton.coordinate import find
from lowrank_optim.ops.triton.direction import adamw_direction_
from lowrank_optim.ops.triton.launch import flags, guard, warps
from lowrank_optim.ops.triton.matrices import wide

COLUMNS, PAIRS = 32, 64
"""Tile: 32 columns are a full line of a row-major float32 matrix, 64 pairs half a KiB of a
spectrum. With 4 warps 16 pairs a lane."""
SPAN = 128
"""Columns that one program of the scores adds up: fixed, so that sums are the same everywhere."""
PICKED_COLUMNS, PICKED_ROWS = 32, 64

# ---------------------------------------------------------------- pairs


@triton.jit
def parts_of(pair):
    """Real and imaginary part of a complex number read as 64 bits, one access for both."""
    real = pair.to(tl.int32).to(tl.float32, bitcast=True)
    return real, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def pair_of(real, imaginary):
    """The 64 bits of a complex number."""
    low = real.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return low | (imaginary.to(tl.int32, bitcast=True).to(tl.int64) << 32)


@triton.jit
def rows_at(base, row, step, j0, si, sj, BC: tl.constexpr, BQ: tl.constexpr, WIDE: tl.constexpr):
    """Addresses (BC, BQ) of rows ``row``, ``row + step``, ... of the columns from j0 on.

    The corner is 64-bit, offsets from it as in ``matrices.tile``.
    """
    j = tl.arange(0, BC)
    q = tl.arange(0, BQ) * step
    if WIDE:
        j = j.to(tl.int64)
        q = q.to(tl.int64)
    corner = base + row.to(tl.int64) * si + j0.to(tl.int64) * sj
    return corner + (j[:, None] * sj + q[None, :] * si)


@triton.jit
def corner_of(m, HALF: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr):
    """First pair and first column of this program; programs of the same columns are neighbours."""
    pairs = m // 2 + 1 if HALF else (m + 1) // 2
    down = tl.cdiv(pairs, BQ)
    program = tl.program_id(0)
    return program % down * BQ, program // down * BC


@triton.jit
def load_pairs(parts, turn, q, j, m, mask, HALF: tl.constexpr):
    """Both rows of pairs ``q (BQ,)`` in columns ``j (BC,)``, of what a transform left."""
    if HALF:
        at = parts + j.to(tl.int64)[:, None] * (m // 2 + 1) + q[None, :]
        real, imaginary = parts_of(tl.load(at, mask, 0))
        cosine, sine = parts_of(tl.load(turn + q, 2 * q <= m, 0))
        first = real * cosine[None, :] - imaginary * sine[None, :]
        second = -(real * sine[None, :] + imaginary * cosine[None, :])
    else:
        at = parts + j.to(tl.int64)[:, None] * m
        first = tl.load(at + q[None, :], mask, 0.0)
        second = tl.load(at + (m - 1 - q)[None, :], mask, 0.0)
    return first, second


@triton.jit
def paired(q, m, HALF: tl.constexpr):
    """Numbers of the rows of each pair, and whether there are such rows; none is named twice."""
    if HALF:  # 0 is alone, and so is the middle of an even length
        first = q
        second = m - q
        there = 2 * q <= m
        both = (q > 0) & (2 * q < m)
    else:
        first = 2 * q
        second = 2 * q + 1
        there = first < m
        both = second < m
    return first, second, there, both


# ---------------------------------------------------------------- kernels


@triton.jit
def cosine_place_kernel(index, out, m, rank, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """Where each of m coefficients is in the sorted ``index (rank,)``; -1 for nowhere."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place, chosen = find(index, k, rank, DEPTH)
    tl.store(out + k, tl.where(chosen, place, -1), k < m)


@triton.jit
def cosine_fold_kernel(
    x, places, out, turn, m, n, xi, xj, weight,
    HALF: tl.constexpr, PICKED: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Columns of x in the order of an FFT, folded reals or half a spectrum, one after the other.

    Row k of what is transformed is row k of x, or row ``places[k]``, or zeros.
    """
    q0, j0 = corner_of(m, HALF, BC, BQ)
    q = q0 + tl.arange(0, BQ)
    j = j0 + tl.arange(0, BC)
    first, second, there, both = paired(q, m, HALF)
    if HALF:  # the middle is a real part and an imaginary one
        both = (q > 0) & there
    inside = (j < n)[:, None]
    if PICKED:
        i = tl.load(places + first, there, -1)
        k = tl.load(places + second, both, -1)
        column = x + j.to(tl.int64)[:, None] * xj
        a = tl.load(column + i.to(tl.int64)[None, :] * xi, inside & (i >= 0)[None, :], 0.0)
        b = tl.load(column + k.to(tl.int64)[None, :] * xi, inside & (k >= 0)[None, :], 0.0)
    else:
        if HALF:
            a_at = rows_at(x, q0, 1, j0, xi, xj, BC, BQ, WIDE)
            b_at = rows_at(x, m - q0, -1, j0, xi, xj, BC, BQ, WIDE)
        else:
            a_at = rows_at(x, 2 * q0, 2, j0, xi, xj, BC, BQ, WIDE)
            b_at = rows_at(x, 2 * q0 + 1, 2, j0, xi, xj, BC, BQ, WIDE)
        a = tl.load(a_at, inside & there[None, :], 0.0)
        b = tl.load(b_at, inside & both[None, :], 0.0)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if HALF:
        cosine, sine = parts_of(tl.load(turn + q, there, 0))
        cosine = (cosine * weight)[None, :]
        sine = (sine * weight)[None, :]
        at = out + j.to(tl.int64)[:, None] * (m // 2 + 1) + q[None, :]
        pair = pair_of(a * cosine + b * sine, a * sine - b * cosine)
        tl.store(at, pair, inside & there[None, :])
    else:
        at = out + j.to(tl.int64)[:, None] * m
        tl.store(at + q[None, :], a, inside & there[None, :])
        tl.store(at + (m - 1 - q)[None, :], b, inside & both[None, :])


@triton.jit
def cosine_score_kernel(
    parts, turn, out, m, n,
    HALF: tl.constexpr, L1: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``out[s, k]``: sum of squares, or of absolute values, of coefficient k over SPAN columns."""
    q0, j0 = corner_of(m, HALF, SPAN, BQ)
    q = q0 + tl.arange(0, BQ)
    first, second, there, both = paired(q, m, HALF)
    above = tl.zeros((BC, BQ), tl.float32)
    below = tl.zeros((BC, BQ), tl.float32)
    for start in tl.static_range(0, SPAN, BC):
        j = j0 + start + tl.arange(0, BC)
        a, b = load_pairs(parts, turn, q, j, m, (j < n)[:, None] & there[None, :], HALF)
        above += tl.abs(a) if L1 else a * a
        below += tl.abs(b) if L1 else b * b
    row = out + (j0 // SPAN).to(tl.int64) * m
    tl.store(row + first, tl.sum(above, axis=0), there)
    tl.store(row + second, tl.sum(below, axis=0), both)


@triton.jit
def cosine_pick_kernel(
    parts, turn, index, out, m, n, rank, oi,
    HALF: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Coefficients ``index`` of what a transform left, a coefficient a row."""
    down = tl.cdiv(rank, BR)
    i = tl.program_id(0) % down * BR + tl.arange(0, BR)
    j = tl.program_id(0) // down * BC + tl.arange(0, BC)
    mask = (j < n)[:, None] & (i < rank)[None, :]
    k = tl.load(index + i, i < rank, 0)
    if HALF:
        later = 2 * k > m
        q = tl.where(later, m - k, k)
        at = parts + j.to(tl.int64)[:, None] * (m // 2 + 1) + q[None, :]
        real, imaginary = parts_of(tl.load(at, mask, 0))
        cosine, sine = parts_of(tl.load(turn + q))
        # the imaginary part with the other sign, or the real one
        by_real = tl.where(later, -sine, cosine)[None, :]
        by_imaginary = tl.where(later, -cosine, -sine)[None, :]
        found = real * by_real + imaginary * by_imaginary
    else:
        q = tl.where(k % 2 == 0, k // 2, m - (k + 1) // 2)
        found = tl.load(parts + j.to(tl.int64)[:, None] * m + q[None, :], mask, 0.0)
    at = out + i.to(tl.int64)[None, :] * oi + j[:, None]
    tl.store(at, found.to(out.dtype.element_ty), mask)


@triton.jit
def cosine_add_kernel(
    w, parts, turn, sound, m, n, wi, wj, decay, step,
    HALF: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``W <- decay W - step X`` of what a transform left of X."""
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(sound) == 0:
            return
    q0, j0 = corner_of(m, HALF, BC, BQ)
    q = q0 + tl.arange(0, BQ)
    j = j0 + tl.arange(0, BC)
    _, _, there, both = paired(q, m, HALF)
    inside = (j < n)[:, None]
    a, b = load_pairs(parts, turn, q, j, m, inside & there[None, :], HALF)
    if HALF:
        a_at = rows_at(w, q0, 1, j0, wi, wj, BC, BQ, WIDE)
        b_at = rows_at(w, m - q0, -1, j0, wi, wj, BC, BQ, WIDE)
    else:
        a_at = rows_at(w, 2 * q0, 2, j0, wi, wj, BC, BQ, WIDE)
        b_at = rows_at(w, 2 * q0 + 1, 2, j0, wi, wj, BC, BQ, WIDE)
    a_mask = inside & there[None, :]
    b_mask = inside & both[None, :]
    a = decay * tl.load(a_at, a_mask, 0.0).to(tl.float32) - step * a
    b = decay * tl.load(b_at, b_mask, 0.0).to(tl.float32) - step * b
    tl.store(a_at, a.to(w.dtype.element_ty), a_mask)
    tl.store(b_at, b.to(w.dtype.element_ty), b_mask)


# ---------------------------------------------------------------- launchers


class _Transform:
    """The transforms of one length: what a call launches around them."""

    def __init__(self, m: int, plan: Sequence[Tensor], basis: str) -> None:
        if basis not in ("dct2", "dct3"):
            raise ValueError(f"basis must be dct2 or dct3, got {basis}")
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
        rank, block = index.shape[0], 256
        out = torch.empty(self.m, dtype=torch.int32, device=index.device)
        cosine_place_kernel[(triton.cdiv(self.m, block),)](
            index.contiguous(), out, self.m, rank, DEPTH=rank.bit_length(), BLOCK=block,
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
    found = []
    for grad in grads:
        m, n = grad.shape
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
    sound: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - step P N``; where ``sound`` is False, W is left as it is."""
    fine = flags(sound) or [None] * len(params)
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
        adamw_direction_(
            [low], [moments[0]], [moments[1]], [low], beta1, beta2, [eps[i]], *own, []
        )
        cosine_lift_add_([w], [index], [low], plan, basis, decay, [steps[i]])
