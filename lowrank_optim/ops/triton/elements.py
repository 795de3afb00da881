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

    A moment that holds NaN must go on saying so: maxima that skip it would hide it in a code.
    """
    bad = x != x
    top = tl.max(tl.where(bad, 0.0, tl.abs(x)), axis=1)
    return tl.where(tl.max(bad.to(tl.int32), axis=1) > 0, float("nan"), top)


@triton.jit
def requantize(x, scale, table):
    """Codes of ``x (blocks, lanes)``: nearest entry to ``x * (1 / scale)``; a zero block is 0.

    The reciprocal of a scale below 2.9e-39 overflows: such a block is lifted by 2^64 first.
    """
    lift = tl.where(scale < 1.1754943508222875e-38, 18446744073709551616.0, 1.0)
    lifted = scale * lift
    empty = lifted == 0.0
    inverse = tl.where(empty, 0.0, tl.div_rn(1.0, tl.where(empty, 1.0, lifted)))
    return nearest((x * lift[:, None]) * inverse[:, None], table).to(tl.uint8)


@triton.jit
def block_layout(first, rows, cols, block, lane, COUNT: tl.constexpr):
    """Where ``COUNT`` blocks lie: their numbers, element numbers and masks (blocks, and elements).

    The tensor is ``rows`` rows of ``cols`` elements, each cut into blocks, the last one shorter.
    """
    per_row = (cols + block - 1) // block
    here = first * COUNT
    k = tl.arange(0, COUNT)
    b = here + k
    # as in row_of: a 64-bit division is a call, one for all lanes is enough
    k = (here % per_row).to(tl.int32) + k
    column = (k % per_row.to(tl.int32)) * block
    start = (here // per_row + k // per_row.to(tl.int32)) * cols + column
    live = b < rows * per_row
    mask = live[:, None] & (lane[None, :] < tl.minimum(block, cols - column)[:, None])
    return b, start, live, mask
