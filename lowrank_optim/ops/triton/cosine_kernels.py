"""What is around the FFT of a cosine transform, in one pass before it and one after it.

torch transforms (cuFFT, rocFFT, MKL), always reals to half a spectrum ``H``; these kernels turn,
reorder, twiddle, add up, pick and apply. Rows of the matrix come in pairs, of two kinds, and a
program has both rows of a pair:

* folded: rows 2q and 2q + 1;
* mirrored (``MIRROR``): rows q and m - q.

Cosines of a matrix take folded rows, as entries q and m - 1 - q, and leave mirrored ones: the real
part of ``H_q``, turned, and its imaginary part, with the other sign. The inverse takes mirrored
rows, turned, as entries q and m - q, and leaves folded ones: by Hartley's transform of what is
turned so, ``Re H_q + Im H_q`` and ``Re H_{q+1} - Im H_{q+1}``. An inverse FFT would do as much, but
it overwrites what it is given, so that torch has it transform a copy.

So rows that are stored together are read together, no table of places is read, and what is
transformed is written whole, zeros included: nothing is scattered, and no two programs write one
entry.

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
def entries(BC: tl.constexpr, BQ: tl.constexpr):
    """Numbers, in a tile (BQ, BC), of pairs and of columns."""
    return tl.arange(0, BQ)[:, None], tl.arange(0, BC)[None, :]


@triton.jit
def descending(end, q):
    """``end - 1 - q``, by fours: for q of 0 to 3 they are ``end - 4`` to ``end - 1``."""
    return (end - 4 - q // 4 * 4) + q % 4


@triton.jit
def backwards(q):
    """The q whose mirror is ``descending``: each four of them from the last to the first."""
    return q // 4 * 4 + 3 - q % 4


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
def mirrored_at(
    base, q0, j0, m, si, sj,
    DOWN: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Addresses of rows q and of rows m - q, the latter by fours with ``DOWN``."""
    q = tl.arange(0, BQ)[:, None]
    second = rows_at(base, m - q0, descending(1, q) if DOWN else -q, j0, si, sj, BC, WIDE)
    return rows_at(base, q0, q, j0, si, sj, BC, WIDE), second


@triton.jit
def apart(rows, BC: tl.constexpr, BQ: tl.constexpr):
    """Rows 2q and rows 2q + 1, (BQ, BC) each, of ``rows (2 BQ, BC)``."""
    return tl.split(tl.permute(tl.reshape(rows, (BQ, 2, BC)), (0, 2, 1)))


@triton.jit
def between(even, odd, BC: tl.constexpr, BQ: tl.constexpr):
    """The rows that :func:`apart` took apart."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (2 * BQ, BC))


@triton.jit
def corner_of(part, m, MIRROR: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr):
    """First pair and first column of a program; programs of the same columns are neighbours."""
    pairs = m // 2 + 1 if MIRROR else (m + 1) // 2
    down = tl.cdiv(pairs, BQ)
    program = part.to(tl.int32)
    return program % down * BQ, program // down * BC


@triton.jit
def there_is(q, m, MIRROR: tl.constexpr):
    """Whether there is a first row of pairs q, and a second one that is not the first.

    Masks compare with a multiple of 8, if m is one of 16, so that four entries have one mask.
    """
    if MIRROR:  # row 0 and the middle of an even length are alone
        first = 2 * q <= m
        second = (q > 0) & (2 * q < m)
    else:
        first = q < m - m // 2
        second = q < m // 2
    return first, second


@triton.jit
def load_pairs(parts, turn, q0, j0, m, n, MIRROR: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr):
    """Both rows of pairs, (BQ, BC) each, of what a transform left."""
    q, j = entries(BC, BQ)
    first, second = there_is(q0 + q, m, MIRROR)
    at = parts + (j0 + j).to(tl.int64) * (m // 2 + 1) + (q0 + q)
    real, imaginary = parts_of(tl.load(at, first & (j0 + j < n), 0))
    if MIRROR:
        cosine, sine = parts_of(tl.load(turn + (q0 + q), first, 0))
        a = real * cosine - imaginary * sine
        b = -(real * sine + imaginary * cosine)
    else:
        a = real + imaginary
        real, imaginary = parts_of(tl.load(at + 1, second & (j0 + j < n), 0))
        b = real - imaginary
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
    MIRROR: tl.constexpr, DOWN: tl.constexpr, PICKED: tl.constexpr, WIDE: tl.constexpr,
    BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Columns of x in the order of an FFT, folded or mirrored and turned, one after the other.

    Row k of what is transformed is row k of x, or row ``places[k]``, or zeros. ``DOWN`` is for
    contiguous columns that are not picked.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED)
    q0, j0 = corner_of(part, m, MIRROR, BC, BQ)
    q, j = entries(BC, BQ)
    column = j0 + j < n
    first, _ = there_is(q0 + q, m, MIRROR)
    if MIRROR:  # the middle is its own mirror
        pair = q0 + (backwards(q) if DOWN else q)
        second = (pair > 0) & (2 * pair <= m)
        entry = descending(m + 1 - q0, q)
        written = (entry < m) & (2 * entry > m)
    else:
        entry = descending(m - q0, q) if DOWN else m - BQ - q0 + q
        second = entry >= m - m // 2
        written = second
    if PICKED:
        places = pointer(table, tensors, t, 2, places, MANY, False)
        upper = q0 + q if MIRROR else 2 * (q0 + q)
        lower = m - q0 - q if MIRROR else 2 * (m - entry) - 1
        i = tl.load(places + upper, first, -1)
        k = tl.load(places + lower, second, -1)
        at = x + (j0 + j).to(tl.int64) * xj
        a = tl.load(at + i.to(tl.int64) * xi, first & column & (i >= 0), 0.0)
        b = tl.load(at + k.to(tl.int64) * xi, second & column & (k >= 0), 0.0)
    elif DOWN and not MIRROR:
        at = tile(x, 2 * q0, j0, xi, xj, 2 * BQ, BC, WIDE)
        a, b = apart(tl.load(at, inside(2 * q0, j0, m, n, 2 * BQ, BC), 0.0), BC, BQ)
        b = turned(b, BC, BQ)
    else:
        if MIRROR:
            a_at, b_at = mirrored_at(x, q0, j0, m, xi, xj, DOWN, BC, BQ, WIDE)
        else:  # backwards, for entries that ascend
            a_at = rows_at(x, 2 * q0, 2 * q, j0, xi, xj, BC, WIDE)
            b_at = rows_at(x, 2 * (q0 + BQ) - 1, -2 * q, j0, xi, xj, BC, WIDE)
        a = tl.load(a_at, first & column, 0.0)
        b = tl.load(b_at, second & column, 0.0)
        b = turned(b, BC, BQ) if DOWN else b
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if MIRROR:
        cosine, sine = parts_of(tl.load(turn + (q0 + q), first, 0))
        even = (a * cosine + b * sine) * weight
        odd = (a * sine - b * cosine) * weight
        a = even + odd
        b = turned(even - odd, BC, BQ)
    at = out + (j0 + j).to(tl.int64) * m
    tl.store(at + (q0 + q), a, first & column)
    tl.store(at + entry, b, written & column)


@triton.jit
def cosine_score_kernel(
    table, tensors, parts, out, turn, m, n,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    MIRROR: tl.constexpr, L1: tl.constexpr, SPAN: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """``out[s, k]``: sum of squares, or of absolute values, of coefficient k over SPAN columns."""
    t, part = locate(table, tensors, MANY, DEPTH)
    parts = pointer(table, tensors, t, 1, parts, MANY, ALIGNED)
    out = pointer(table, tensors, t, 2, out, MANY, False)
    q0, j0 = corner_of(part, m, MIRROR, SPAN, BQ)
    above = tl.zeros((BQ, BC), tl.float32)
    below = tl.zeros((BQ, BC), tl.float32)
    for start in tl.static_range(0, SPAN, BC):
        a, b = load_pairs(parts, turn, q0, j0 + start, m, n, MIRROR, BC, BQ)
        above += tl.abs(a) if L1 else a * a
        below += tl.abs(b) if L1 else b * b
    q = q0 + tl.arange(0, BQ)
    first, second = there_is(q, m, MIRROR)
    row = out + (j0 // SPAN).to(tl.int64) * m
    tl.store(row + (q if MIRROR else 2 * q), tl.sum(above, axis=1), first)
    tl.store(row + (m - q if MIRROR else 2 * q + 1), tl.sum(below, axis=1), second)


@triton.jit
def cosine_pick_kernel(
    table, tensors, parts, index, out, turn, m, n, rank, oi,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    MIRROR: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
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
    if MIRROR:
        later = 2 * k > m
        q = tl.where(later, m - k, k)
        cosine, sine = parts_of(tl.load(turn + q))
        # the imaginary part with the other sign, or the real one
        by_real = tl.where(later, -sine, cosine)
        by_imaginary = tl.where(later, -cosine, -sine)
    else:
        q = (k + 1) // 2
        by_real = tl.full((BR,), 1.0, tl.float32)
        by_imaginary = tl.where(k % 2 == 0, 1.0, -1.0)
    # entries ascend by no fixed step: in one dimension lanes cannot but follow them
    q = tl.reshape(tl.broadcast_to(q[None, :], (BC, BR)), (BC * BR,))
    j = j0 + tl.arange(0, BC * BR) // BR
    there = tl.arange(0, BC * BR) % BR < rank - i0
    found = tl.load(parts + j.to(tl.int64) * (m // 2 + 1) + q, there & (j < n), 0)
    real, imaginary = parts_of(tl.trans(tl.reshape(found, (BC, BR))))
    found = real * by_real[:, None] + imaginary * by_imaginary[:, None]
    i, j = entries(BC, BR)
    found = tl.where(known[:, None], found, float("nan"))
    at = out + (i0 + i).to(tl.int64) * oi + (j0 + j)
    tl.store(at, found.to(out.dtype.element_ty), (i0 + i < rank) & (j0 + j < n))


@triton.jit(do_not_specialize=["step_bits"])
def cosine_add_kernel(
    table, tensors, w, parts, finite, step_bits, turn, m, n, wi, wj, decay,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    MIRROR: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr, SOUND: tl.constexpr,
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
    q0, j0 = corner_of(part, m, MIRROR, BC, BQ)
    q, j = entries(BC, BQ)
    if DOWN and not MIRROR:
        at = tile(w, 2 * q0, j0, wi, wj, 2 * BQ, BC, WIDE)
        mask = inside(2 * q0, j0, m, n, 2 * BQ, BC)
        x = tl.load(at, mask, 0.0)
        a, b = load_pairs(parts, turn, q0, j0, m, n, MIRROR, BC, BQ)
        x = decay * x.to(tl.float32) - step * between(a, b, BC, BQ)
        tl.store(at, x.to(w.dtype.element_ty), mask)
    else:
        first, second = there_is(q0 + q, m, MIRROR)
        if MIRROR:
            a_at, b_at = mirrored_at(w, q0, j0, m, wi, wj, DOWN, BC, BQ, WIDE)
            _, second = there_is(q0 + (backwards(q) if DOWN else q), m, MIRROR)
        else:
            a_at = rows_at(w, 2 * q0, 2 * q, j0, wi, wj, BC, WIDE)
            b_at = rows_at(w, 2 * q0 + 1, 2 * q, j0, wi, wj, BC, WIDE)
        a_mask = first & (j0 + j < n)
        b_mask = second & (j0 + j < n)
        x = tl.load(a_at, a_mask, 0.0)  # all is asked for before any of it is waited for
        y = tl.load(b_at, b_mask, 0.0)
        a, b = load_pairs(parts, turn, q0, j0, m, n, MIRROR, BC, BQ)
        b = turned(b, BC, BQ) if DOWN else b
        x = decay * x.to(tl.float32) - step * a
        y = decay * y.to(tl.float32) - step * b
        tl.store(a_at, x.to(w.dtype.element_ty), a_mask)
        tl.store(b_at, y.to(w.dtype.element_ty), b_mask)
