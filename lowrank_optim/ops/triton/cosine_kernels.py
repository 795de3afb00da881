"""What is around the FFT of a cosine transform, in one pass before it and one after it.

torch transforms (cuFFT, rocFFT, MKL); these kernels turn, reorder, twiddle, add up, pick and apply.
Both orders that a transform needs pair rows of the matrix, and a program has both of a pair:

* folded, as the FFT takes or leaves reals: rows 2q and 2q + 1 are entries q and m - 1 - q;
* half a spectrum, as it takes or leaves complex numbers: rows q and m - q are the real part of
  entry q, turned, and its imaginary part, with the other sign.

So rows that are stored together are read together, no table of places is read, and a spectrum is
written whole, zeros included: nothing is scattered, and no two programs write one entry.

A warp's lanes have to run along memory, and the compiler lays them so where it sees that addresses
ascend by one. Where they do not, as for entries m - 1 - q, some versions of it take the first
dimension of a tile and others the last. So rows of a contiguous matrix are taken backwards, for
entries that ascend. Where it is the columns that are contiguous (``DOWN``), both rows of folded
pairs are read as one tile and taken apart in registers, and what descends does so by fours: four
entries that ascend, which are one access, and then the four before them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowrank_optim.ops.triton.coordinate import find
from lowrank_optim.ops.triton.launch import as_float, locate, number, pointer
from lowrank_optim.ops.triton.matrices import inside, tile

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
def entries(BC: tl.constexpr, BQ: tl.constexpr):
    """Numbers, in a tile (BQ, BC), of pairs and of columns."""
    return tl.arange(0, BQ)[:, None], tl.arange(0, BC)[None, :]


@triton.jit
def descending(end, q):
    """``end - 1 - q``, by fours: for q of 0 to 3 they are ``end - 4`` to ``end - 1``."""
    return (end - 4 - q // 4 * 4) + q % 4


@triton.jit
def turned(x, BC: tl.constexpr, BQ: tl.constexpr):
    """``x (BQ, BC)`` with each four of its rows backwards, as ``descending`` has them."""
    fours = tl.permute(tl.reshape(x, (BQ // 4, 2, 2, BC)), (0, 3, 1, 2))
    even, odd = tl.split(fours)
    first, last = tl.split(tl.permute(tl.join(odd, even), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(last, first), (0, 3, 2, 1)), (BQ, BC))


@triton.jit
def rows_at(base, row, q, j0, si, sj, BC: tl.constexpr, WIDE: tl.constexpr):
    """Addresses of rows ``row + q`` of ``q (BQ, 1)``, of the BC columns from j0 on.

    The corner is 64-bit, offsets from it as in ``matrices.tile``.
    """
    j = tl.arange(0, BC)[None, :]
    if WIDE:
        j = j.to(tl.int64)
        q = q.to(tl.int64)
    corner = base + row.to(tl.int64) * si + j0.to(tl.int64) * sj
    return corner + (q * si + j * sj)


@triton.jit
def both_rows_at(
    base, q0, j0, m, si, sj,
    HALF: tl.constexpr, DOWN: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Addresses of the first and of the second rows of pairs, in the order of their entries."""
    q = tl.arange(0, BQ)[:, None]
    if HALF:
        first = rows_at(base, q0, q, j0, si, sj, BC, WIDE)
        second = rows_at(base, m - q0, descending(1, q) if DOWN else -q, j0, si, sj, BC, WIDE)
    else:
        first = rows_at(base, 2 * q0, 2 * q, j0, si, sj, BC, WIDE)
        second = rows_at(base, 2 * (q0 + BQ) - 1, -2 * q, j0, si, sj, BC, WIDE)
    return first, second


@triton.jit
def apart(rows, BC: tl.constexpr, BQ: tl.constexpr):
    """Rows 2q and rows 2q + 1, (BQ, BC) each, of ``rows (2 BQ, BC)``."""
    return tl.split(tl.permute(tl.reshape(rows, (BQ, 2, BC)), (0, 2, 1)))


@triton.jit
def between(even, odd, BC: tl.constexpr, BQ: tl.constexpr):
    """The rows that :func:`apart` took apart."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (2 * BQ, BC))


@triton.jit
def corner_of(part, m, HALF: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr):
    """First pair and first column of a program; programs of the same columns are neighbours."""
    pairs = m // 2 + 1 if HALF else (m + 1) // 2
    down = tl.cdiv(pairs, BQ)
    program = part.to(tl.int32)
    return program % down * BQ, program // down * BC


@triton.jit
def firsts(q0, q, m, HALF: tl.constexpr):
    """Entries of a transform that are first rows of pairs ``q0 + q``, and whether there are.

    Masks compare with a multiple of 8, if m is one of 16, so that four entries have one mask.
    """
    first = q0 + q
    return first, 2 * first <= m if HALF else first < m - m // 2


@triton.jit
def seconds(q0, q, m, HALF: tl.constexpr, DOWN: tl.constexpr, BQ: tl.constexpr):
    """Those that are second rows; but with ``DOWN`` from the last pair of a program on.

    With it they descend, by fours. No row is named twice: 0 and the middle of an even length are
    alone in half a spectrum.
    """
    if HALF:
        second = q0 + (q // 4 * 4 + 3 - q % 4 if DOWN else q)
        both = (second > 0) & (2 * second < m)
    else:
        second = descending(m - q0, q) if DOWN else m - BQ - q0 + q
        both = second >= m - m // 2
    return second, both


@triton.jit
def load_pairs(
    parts, turn, q0, j0, m, n,
    HALF: tl.constexpr, DOWN: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Both rows of pairs, (BQ, BC) each, of what a transform left."""
    q, j = entries(BC, BQ)
    first, there = firsts(q0, q, m, HALF)
    mask = there & (j0 + j < n)
    if HALF:
        at = parts + (j0 + j).to(tl.int64) * (m // 2 + 1)
        real, imaginary = parts_of(tl.load(at + first, mask, 0))
        cosine, sine = parts_of(tl.load(turn + first, there, 0))
        a = real * cosine - imaginary * sine
        b = -(real * sine + imaginary * cosine)
    else:
        at = parts + (j0 + j).to(tl.int64) * m
        a = tl.load(at + first, mask, 0.0)
        second, both = seconds(q0, q, m, HALF, DOWN, BQ)
        b = tl.load(at + second, both & (j0 + j < n), 0.0)
        b = turned(b, BC, BQ) if DOWN else b
    return a, b


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
    HALF: tl.constexpr, DOWN: tl.constexpr, PICKED: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Columns of x in the order of an FFT, folded reals or half a spectrum, one after the other.

    Row k of what is transformed is row k of x, or row ``places[k]``, or zeros. ``DOWN`` is for
    contiguous columns that are not picked.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED)
    q0, j0 = corner_of(part, m, HALF, BC, BQ)
    q, j = entries(BC, BQ)
    first, there = firsts(q0, q, m, HALF)
    mask = there & (j0 + j < n)
    second, both = seconds(q0, q, m, HALF, DOWN, BQ)
    if HALF:  # the middle is a real part and an imaginary one
        both = (second > 0) & (2 * second <= m)
    mask2 = both & (j0 + j < n)
    if PICKED:
        places = pointer(table, tensors, t, 2, places, MANY, False)
        i = tl.load(places + (first if HALF else 2 * first), there, -1)
        lower = m - second if HALF else 2 * (m - second) - 1
        k = tl.load(places + lower, both, -1)
        column = x + (j0 + j).to(tl.int64) * xj
        a = tl.load(column + i.to(tl.int64) * xi, mask & (i >= 0), 0.0)
        b = tl.load(column + k.to(tl.int64) * xi, mask2 & (k >= 0), 0.0)
    elif DOWN and not HALF:
        at = tile(x, 2 * q0, j0, xi, xj, 2 * BQ, BC, WIDE)
        a, b = apart(tl.load(at, inside(2 * q0, j0, m, n, 2 * BQ, BC), 0.0), BC, BQ)
    else:
        a_at, b_at = both_rows_at(x, q0, j0, m, xi, xj, HALF, DOWN, BC, BQ, WIDE)
        a = tl.load(a_at, mask, 0.0)
        b = tl.load(b_at, mask2, 0.0)
    b = turned(b, BC, BQ) if DOWN else b
    if HALF:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        cosine, sine = parts_of(tl.load(turn + first, there, 0))
        cosine *= weight
        sine *= weight
        at = out + (j0 + j).to(tl.int64) * (m // 2 + 1) + first
        tl.store(at, pair_of(a * cosine + b * sine, a * sine - b * cosine), mask)
    else:
        at = out + (j0 + j).to(tl.int64) * m
        tl.store(at + first, a.to(tl.float32), mask)
        tl.store(at + second, b.to(tl.float32), mask2)


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
    above = tl.zeros((BQ, BC), tl.float32)
    below = tl.zeros((BQ, BC), tl.float32)
    for start in tl.static_range(0, SPAN, BC):
        a, b = load_pairs(parts, turn, q0, j0 + start, m, n, HALF, False, BC, BQ)
        above += tl.abs(a) if L1 else a * a
        below += tl.abs(b) if L1 else b * b
    q = tl.arange(0, BQ)
    first, there = firsts(q0, q, m, HALF)
    second, both = seconds(q0, q, m, HALF, False, BQ)
    row = out + (j0 // SPAN).to(tl.int64) * m
    tl.store(row + (first if HALF else 2 * first), tl.sum(above, axis=1), there)
    tl.store(row + (m - second if HALF else 2 * (m - second) - 1), tl.sum(below, axis=1), both)


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
    i0 = program % down * BR
    j0 = program // down * BC
    row = i0 + tl.arange(0, BR)
    k = tl.load(index + row, row < rank, 0)
    known = (k >= 0) & (k < m)
    k = tl.where(known, k, 0)
    if HALF:
        later = 2 * k > m
        q = tl.where(later, m - k, k)
        cosine, sine = parts_of(tl.load(turn + q))
        # the imaginary part with the other sign, or the real one
        by_real = tl.where(later, -sine, cosine)[:, None]
        by_imaginary = tl.where(later, -cosine, -sine)[:, None]
        pitch = m // 2 + 1
    else:
        q = tl.where(k % 2 == 0, k // 2, m - (k + 1) // 2)
        pitch = m
    # entries ascend by no fixed step: in one dimension lanes cannot but follow them
    q = tl.reshape(tl.broadcast_to(q[None, :], (BC, BR)), (BC * BR,))
    j = j0 + tl.arange(0, BC * BR) // BR
    there = tl.arange(0, BC * BR) % BR < rank - i0
    found = tl.load(parts + j.to(tl.int64) * pitch + q, there & (j < n), 0)
    found = tl.trans(tl.reshape(found, (BC, BR)))
    if HALF:
        real, imaginary = parts_of(found)
        found = real * by_real + imaginary * by_imaginary
    i, j = entries(BC, BR)
    found = tl.where(known[:, None], found, float("nan"))
    at = out + (i0 + i).to(tl.int64) * oi + (j0 + j)
    tl.store(at, found.to(out.dtype.element_ty), (i0 + i < rank) & (j0 + j < n))


@triton.jit(do_not_specialize=["step_bits"])
def cosine_add_kernel(
    table, tensors, w, parts, finite, step_bits, turn, m, n, wi, wj, decay,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    HALF: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``W <- decay W - step X`` of what a transform left of X; ``DOWN`` for contiguous columns."""
    t, part = locate(table, tensors, MANY, DEPTH)
    if SOUND:  # noqa: SIM102 (one is decided at compile time)
        if tl.load(pointer(table, tensors, t, 3, finite, MANY, False)) == 0:
            return
    w = pointer(table, tensors, t, 1, w, MANY, ALIGNED)
    parts = pointer(table, tensors, t, 2, parts, MANY, ALIGNED)
    step = as_float(number(table, tensors, t, 4, step_bits, MANY))
    q0, j0 = corner_of(part, m, HALF, BC, BQ)
    if DOWN and not HALF:
        at = tile(w, 2 * q0, j0, wi, wj, 2 * BQ, BC, WIDE)
        mask = inside(2 * q0, j0, m, n, 2 * BQ, BC)
        x = tl.load(at, mask, 0.0)
        a, b = load_pairs(parts, turn, q0, j0, m, n, HALF, DOWN, BC, BQ)
        x = decay * x.to(tl.float32) - step * between(a, b, BC, BQ)
        tl.store(at, x.to(w.dtype.element_ty), mask)
    else:
        a_at, b_at = both_rows_at(w, q0, j0, m, wi, wj, HALF, DOWN, BC, BQ, WIDE)
        q, j = entries(BC, BQ)
        _, there = firsts(q0, q, m, HALF)
        _, both = seconds(q0, q, m, HALF, DOWN, BQ)
        a_mask = there & (j0 + j < n)
        b_mask = both & (j0 + j < n)
        x = tl.load(a_at, a_mask, 0.0)  # all is asked for before any of it is waited for
        y = tl.load(b_at, b_mask, 0.0)
        a, b = load_pairs(parts, turn, q0, j0, m, n, HALF, DOWN, BC, BQ)
        b = turned(b, BC, BQ) if DOWN else b
        x = decay * x.to(tl.float32) - step * a
        y = decay * y.to(tl.float32) - step * b
        tl.store(a_at, x.to(w.dtype.element_ty), a_mask)
        tl.store(b_at, y.to(w.dtype.element_ty), b_mask)
