"""Stochastic rounding to bfloat16 with noise that depends on seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.noise import check_places
from lowrank_optim.ops.triton.launch import (
    ELEMENTS,
    cdiv,
    groups,
    launch,
    length,
    locate,
    number,
    packed,
    pointer,
    select,
    signed32,
)


@triton.jit
def lowbias32(x):
    """Wellons' 32-bit integer hash: two multiplications, bias 0.17 of an ideal one's."""
    x = x ^ (x >> 16)
    x = x * tl.full((), 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit(do_not_specialize=["count", "seed", "offset", "width", "row", "column"])
def stochastic_round_kernel(
    table, tensors, x, out, count, seed, offset, width, row, column,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add 16 random bits below the ones bfloat16 keeps, then truncate.

    In integers throughout: no cast rounds, so that every backend gives the same bits.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    out = pointer(table, tensors, t, 2, out, MANY, ALIGNED)
    size = length(table, tensors, t, 3, count, MANY, ALIGNED)
    start = part * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < size - start
    bits = tl.load(x + start + lane, mask, 0.0).to(tl.uint32, bitcast=True)
    key = number(table, tensors, t, 4, seed, MANY).to(tl.uint32)
    offset = number(table, tensors, t, 5, offset, MANY)
    width = number(table, tensors, t, 6, width, MANY)
    row = number(table, tensors, t, 7, row, MANY)
    column = number(table, tensors, t, 8, column, MANY)
    first = start // width  # one division of 64 bits a program, where each lane would have its own
    within = start - first * width + lane
    more = (within >= width).to(tl.int64)  # a program sees two rows at most
    if width < BLOCK:
        more = (within.to(tl.int32) // width.to(tl.int32)).to(tl.int64)
    position = offset + (first + more) * row + (within - more * width) * column
    noise = lowbias32(position.to(tl.uint32) ^ key) & 0xFFFF
    magnitude = bits & 0x7FFFFFFF
    high = tl.where(magnitude < 0x7F800000, bits + noise, bits) >> 16
    high = tl.where(magnitude > 0x7F800000, high | 0x40, high)  # a NaN must not become Inf
    tl.store(out + start + lane, high.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask)


def stochastic_round_(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    offsets: Sequence[int],
    widths: Sequence[int],
    row_strides: Sequence[int],
    column_strides: Sequence[int],
) -> None:
    """Round float32 ``xs`` to bfloat16 ``outs``, up or down, unbiased."""
    packed(("outs",), (outs,))
    check_places(len(xs), offsets, widths, row_strides, column_strides)
    numbers = [[signed32(x) for x in own] for own in (seeds, offsets, row_strides, column_strides)]
    lists = [[x.contiguous() for x in xs], outs]
    for at in groups(lists):
        sizes, width = [outs[i].numel() for i in at], [widths[i] for i in at]
        key, first, row, column = select(numbers, at)
        launch(
            stochastic_round_kernel, select(lists, at), [sizes, key, first, width, row, column],
            [cdiv(n, ELEMENTS) for n in sizes], BLOCK=ELEMENTS,
        )  # fmt: skip
