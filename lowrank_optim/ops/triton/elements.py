"""Element functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sign(x):
    """-1, 0, 1; NaN stays NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def row_of(start, lane, width):
    """``(start + lane) // width`` with the 64-bit division done once per program, not per lane."""
    return start // width + ((start % width).to(tl.int32) + lane) // width.to(tl.int32)


@triton.jit
def dynamic_code(v, edges, SIGNED: tl.constexpr):
    """Code of ``v`` in a dynamic map, as `nearest` finds it: one probe in place of ten.

    Within each of the seven decades the entries are equally far apart, and half as far as in the
    next: code against magnitude is a concave chain of lines, so the least of them. That is exact
    but for half a code. ``edges`` has the largest value that each code still stands for.
    """
    v = tl.minimum(tl.maximum(v, -0.9921875), 1.0)  # beyond the least edge: a code of 0
    size = tl.abs(v) if SIGNED else tl.maximum(v, 0.0)
    first: tl.constexpr = 1.0 if SIGNED else 2.0  # entries of the lowest decade
    less: tl.constexpr = 0.5 if SIGNED else 2.0
    code = tl.fma(size, first / 0.9e-6, first * 8 / 9 - less)
    for d in tl.static_range(1, 7):
        line = tl.fma(size, first / 0.9e-6 * 0.2**d, first * 8 / 9 * 2**d - less)
        code = tl.minimum(code, line)
    if SIGNED:
        code = tl.where(v < 0, -code, code) + 126.5
    # 3 * 2^22 leaves no place for fractions: the last bits are the nearest integer
    below = (code + 12582912.0).to(tl.int32, bitcast=True) & 255
    return below + (v > tl.load(edges + below)).to(tl.int32)


@triton.jit
def nearest(v, table):
    """Index of the entry of a sorted 256-entry table nearest to ``v``; the lower one of a tie.

    A binary search, exact for any table: 8 probes, then the distances of both neighbours are
    compared in float32. Values beyond the table, and NaN, take an end.
    """
    v = tl.minimum(tl.maximum(v, -1.0), 1.0)
    right = tl.zeros(v.shape, tl.int32)
    for s in tl.static_range(8):
        probe = tl.load(table + right + ((128 >> s) - 1))
        right = tl.where(probe < v, right + (128 >> s), right)
    left = tl.maximum(right - 1, 0)
    nearer = tl.abs(tl.load(table + right) - v) < tl.abs(v - tl.load(table + left))
    return tl.where(nearer, right, left)


@triton.jit
def block_scale(x):
    """Largest magnitude along the last axis of ``x (blocks, lanes)``; NaN if there is one.

    A moment that holds NaN must go on saying so: maxima of floats that skip it would hide it in a
    code. As integers magnitudes have the same order, and NaN is above them all.
    """
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    return tl.where(top > 0x7F800000, float("nan"), top.to(tl.float32, bitcast=True))


@triton.jit
def requantize(x, scale, table, FORM: tl.constexpr):
    """Codes of ``x (blocks, lanes)``: nearest entry to ``x * (1 / scale)``; a zero block is 0.

    The reciprocal of a scale below 2.9e-39 overflows: such a block is lifted by 2^64 first.
    ``table`` and ``FORM`` are those of `quantize.form`.
    """
    lift = tl.where(scale < 1.1754943508222875e-38, 18446744073709551616.0, 1.0)
    lifted = scale * lift
    empty = lifted == 0.0
    inverse = tl.where(empty, 0.0, tl.div_rn(1.0, tl.where(empty, 1.0, lifted)))
    unit = (x * lift[:, None]) * inverse[:, None]
    code = nearest(unit, table) if FORM == 0 else dynamic_code(unit, table, FORM == 1)
    return code.to(tl.uint8)


@triton.jit
def block_layout(
    first, rows, cols, block, lane, COUNT: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr
):
    """Where ``COUNT`` blocks lie: their numbers, element numbers and masks (blocks, and elements).

    The tensor is ``rows`` rows of ``cols`` elements, each cut into blocks, the last one shorter.
    WHOLE: all blocks have ``LANES`` elements, and their number is a multiple of ``COUNT``. No lane
    has a mask then, and neighbours share an access.
    """
    here = first * COUNT
    k = tl.arange(0, COUNT)
    b = here + k
    if WHOLE:
        start = tl.multiple_of(b * LANES, 16)
        live = tl.full((COUNT,), 1, tl.int1)
        mask = tl.full((COUNT, LANES), 1, tl.int1)
    else:
        per_row = (cols + block - 1) // block
        # as in row_of: a 64-bit division is a call, one for all lanes is enough
        k = (here % per_row).to(tl.int32) + k
        column = (k % per_row.to(tl.int32)) * block
        start = (here // per_row + k // per_row.to(tl.int32)) * cols + column
        live = b < rows * per_row
        mask = live[:, None] & (lane[None, :] < tl.minimum(block, cols - column)[:, None])
    return b, start, live, mask
