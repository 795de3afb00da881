"""What is around the FFT of a cosine transform, in one pass before it and one after it.

torch transforms (cuFFT, rocFFT, MKL); these kernels turn, reorder, twiddle, add up, pick and apply.
Both orders that a transform needs pair rows of the matrix, and a program has both of a pair:

* folded, as the FFT takes or leaves reals: rows 2q and 2q + 1 are entries q and m - 1 - q;
* half a spectrum, as it takes or leaves complex numbers: rows q and m - q are the real part of
  entry q, turned, and its imaginary part, with the other sign.

So rows that are stored together are read together, no table of places is read, and a spectrum is
written whole, zeros included: nothing is scattered, and no two programs write one entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowrank_optim.ops.triton.coordinate import find
from lowrank_optim.ops.triton.launch import as_float, locate, number, pointer

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
def corner_of(part, m, HALF: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr):
    """First pair and first column of a program; programs of the same columns are neighbours."""
    pairs = m // 2 + 1 if HALF else (m + 1) // 2
    down = tl.cdiv(pairs, BQ)
    program = part.to(tl.int32)
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
def cosine_place_kernel(
    table, tensors, index, out, m, rank,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    PROBES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where each of m coefficients is in the sorted ``index (rank,)``; -1 for nowhere."""
    t, part = locate(table, tensors, MANY, DEPTH)
    index = pointer(table, tensors, t, 1, index, MANY, False)
    out = pointer(table, tensors, t, 2, out, MANY, False)
    k = part.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    place, chosen = find(index, k, rank, PROBES)
    tl.store(out + k, tl.where(chosen, place, -1), k < m)


@triton.jit
def cosine_fold_kernel(
    table, tensors, x, places, out, turn, m, n, xi, xj, weight,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, PICKED: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Columns of x in the order of an FFT, folded reals or half a spectrum, one after the other.

    Row k of what is transformed is row k of x, or row ``places[k]``, or zeros.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED)
    q0, j0 = corner_of(part, m, HALF, BC, BQ)
    q = q0 + tl.arange(0, BQ)
    j = j0 + tl.arange(0, BC)
    first, second, there, both = paired(q, m, HALF)
    if HALF:  # the middle is a real part and an imaginary one
        both = (q > 0) & there
    inside = (j < n)[:, None]
    if PICKED:
        places = pointer(table, tensors, t, 2, places, MANY, False)
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
    table, tensors, parts, out, turn, m, n,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, L1: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``out[s, k]``: sum of squares, or of absolute values, of coefficient k over SPAN columns."""
    t, part = locate(table, tensors, MANY, DEPTH)
    parts = pointer(table, tensors, t, 1, parts, MANY, ALIGNED)
    out = pointer(table, tensors, t, 2, out, MANY, False)
    q0, j0 = corner_of(part, m, HALF, SPAN, BQ)
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
    table, tensors, parts, index, out, turn, m, n, rank, oi,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Coefficients ``index`` of what a transform left, a coefficient a row.

    No program can raise: of an index that is none of m coefficients nothing is read and the row is
    NaN, which a step takes for a gradient that is not finite.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    parts = pointer(table, tensors, t, 1, parts, MANY, ALIGNED)
    index = pointer(table, tensors, t, 2, index, MANY, False)
    out = pointer(table, tensors, t, 3, out, MANY, False)
    down = tl.cdiv(rank, BR)
    program = part.to(tl.int32)
    i = program % down * BR + tl.arange(0, BR)
    j = program // down * BC + tl.arange(0, BC)
    mask = (j < n)[:, None] & (i < rank)[None, :]
    k = tl.load(index + i, i < rank, 0)
    known = (k >= 0) & (k < m)
    k = tl.where(known, k, 0)
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
    found = tl.where(known[None, :], found, float("nan"))
    tl.store(at, found.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["step_bits"])
def cosine_add_kernel(
    table, tensors, w, parts, finite, step_bits, turn, m, n, wi, wj, decay,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``W <- decay W - step X`` of what a transform left of X."""
    t, part = locate(table, tensors, MANY, DEPTH)
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(pointer(table, tensors, t, 3, finite, MANY, False)) == 0:
            return
    w = pointer(table, tensors, t, 1, w, MANY, ALIGNED)
    parts = pointer(table, tensors, t, 2, parts, MANY, ALIGNED)
    step = as_float(number(table, tensors, t, 4, step_bits, MANY))
    q0, j0 = corner_of(part, m, HALF, BC, BQ)
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
