"""Rows that are turned or stepped, and their products: a launch for all alike factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.triton.launch import (
    groups,
    launch,
    locate,
    next_power_of_2,
    packed,
    pointer,
    select,
    warps,
)

COLUMNS = 2048
"""Entries of a row that a program has at once: four of a lane, with 16 warps. With eight a lane
what is written in 16 bits has another layout, and passes through shared memory."""
EACH = COLUMNS // 16
"""Of a warp."""


def _block(width: int) -> int:
    return max(16, min(COLUMNS, next_power_of_2(width)))


@triton.jit
def row_dots_kernel(
    table, tensors, x, y, out, width,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out_i = sum_j x_ij y_ij``; a program a row."""
    t, i = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED) + i * width
    y = pointer(table, tensors, t, 2, y, MANY, ALIGNED) + i * width
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, width, BLOCK):
        mask = lane < width - j
        own = tl.load(x + j + lane, mask, 0.0).to(tl.float32)
        total += own * tl.load(y + j + lane, mask, 0.0).to(tl.float32)
    tl.store(pointer(table, tensors, t, 3, out, MANY, False) + i, tl.sum(total, axis=0))


def row_dots_(xs: Sequence[Tensor], ys: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """``x_i . y_i`` of each row."""
    lists = [[x.contiguous() for x in xs], [y.contiguous() for y in ys], outs]
    for at in groups(lists, [x.shape[-1] for x in xs]):
        block = _block(xs[at[0]].shape[-1])
        launch(
            row_dots_kernel, select(lists, at), [], [outs[i].numel() for i in at],
            xs[at[0]].shape[-1], BLOCK=block, num_warps=warps(max(1, block // EACH)),
        )  # fmt: skip


@triton.jit(do_not_specialize=["rank", "rows"])
def turn_rows_kernel(
    table, tensors, x, direction, length, across, out, move, width, rank, rows, lr,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    LENGTHS: tl.constexpr, ACROSS: tl.constexpr, MOVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x' = unit(x - lr d)``, and what the weight moves by; a program a row."""
    t, i = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED) + i * width
    direction = pointer(table, tensors, t, 2, direction, MANY, ALIGNED) + i * width
    out = pointer(table, tensors, t, 5, out, MANY, ALIGNED) + i * width
    lane = tl.arange(0, BLOCK)
    if ACROSS:
        parts = pointer(table, tensors, t, 4, across, MANY, False)
        norm = tl.sqrt(tl.load(parts + i)).to(tl.float32)
        moved = tl.load(parts + rows + i) != 0
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        moves = tl.zeros((BLOCK,), tl.int32)
        for j in range(0, width, BLOCK):
            mask = lane < width - j
            step = tl.load(direction + j + lane, mask, 0.0).to(tl.float32) * lr
            new = tl.load(x + j + lane, mask, 0.0) - step
            squares += new * new
            moves |= (step != 0).to(tl.int32)
        norm = tl.sqrt_rn(tl.sum(squares, axis=0))
        moved = tl.max(moves, axis=0) != 0
    norm = tl.where(norm < 1.1754943508222875e-38, 1.1754943508222875e-38, norm)  # NaN stays
    if LENGTHS:
        lengths = pointer(table, tensors, t, 3, length, MANY, False)
        after = tl.load(lengths + i)
        before = tl.load(lengths + rows + i)
    if MOVES:
        first = pointer(table, tensors, t, 6, move, MANY, ALIGNED) + (i + i // rank * rank) * width
        second = first + tl.full((), rank, tl.int64) * width
    for j in range(0, width, BLOCK):
        mask = lane < width - j
        old = tl.load(x + j + lane, mask, 0.0)
        step = tl.load(direction + j + lane, mask, 0.0).to(tl.float32) * lr
        new = tl.where(moved, tl.div_rn(old - step, norm), old)
        tl.store(out + j + lane, new, mask)
        if MOVES:
            if LENGTHS:
                one = after * new
                two = one - before * old
            else:
                one = new - old
                two = old
            tl.store(first + j + lane, one.to(move.dtype.element_ty), mask)
            tl.store(second + j + lane, two.to(move.dtype.element_ty), mask)


def turn_rows_(
    xs: Sequence[Tensor],
    directions: Sequence[Tensor],
    lengths: Sequence[Tensor],
    across: Sequence[Tensor],
    outs: Sequence[Tensor],
    moves: Sequence[Tensor],
    lr: float,
) -> None:
    """``x' = unit(x - lr d)``, and rows by whose products with others the weight moves."""
    given = [[x.contiguous() for x in own] for own in (xs, directions, lengths, across)]
    packed(("outs",), (outs,))
    lists = [*given, outs, moves]
    for at in groups(lists, [x.shape for x in xs]):
        *batch, rank, width = xs[at[0]].shape
        rows, block = math.prod(batch) * rank, _block(width)
        launch(
            turn_rows_kernel, select(lists, at), [], [rows] * len(at), width, rank, rows, lr,
            LENGTHS=len(lengths) > 0, ACROSS=len(across) > 0, MOVES=len(moves) > 0, BLOCK=block,
            num_warps=warps(max(1, block // EACH)),
        )  # fmt: skip


@triton.jit(do_not_specialize=["rank"])
def step_rows_kernel(
    table, tensors, x, direction, out, move, shrink, width, rank, lr, decay,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    AHEAD: tl.constexpr, DECAYED: tl.constexpr, MOVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``x' = decay x - lr d``, and what the weight moves by; a program a row."""
    t, i = locate(table, tensors, MANY, DEPTH)
    if DECAYED:
        decay *= tl.load(pointer(table, tensors, t, 5, shrink, MANY, False)).to(tl.float32)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED) + i * width
    direction = pointer(table, tensors, t, 2, direction, MANY, ALIGNED) + i * width
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED) + i * width
    if MOVES:
        first = pointer(table, tensors, t, 4, move, MANY, ALIGNED) + (i + i // rank * rank) * width
        second = first + tl.full((), rank, tl.int64) * width
    lane = tl.arange(0, BLOCK)
    for j in range(0, width, BLOCK):
        mask = lane < width - j
        old = tl.load(x + j + lane, mask, 0.0)
        step = tl.load(direction + j + lane, mask, 0.0).to(tl.float32) * lr
        new = decay * old - step
        tl.store(out + j + lane, new, mask)
        if MOVES:
            by = new - old
            one = new if AHEAD else by
            two = by if AHEAD else new - by
            tl.store(first + j + lane, one.to(move.dtype.element_ty), mask)
            tl.store(second + j + lane, two.to(move.dtype.element_ty), mask)


def step_rows_(
    xs: Sequence[Tensor],
    directions: Sequence[Tensor],
    outs: Sequence[Tensor],
    moves: Sequence[Tensor],
    lr: float,
    decay: float,
    ahead: bool,
    decays: Sequence[Tensor] = (),
) -> None:
    """``x' = decay x - lr d``, and rows by whose products with others the weight moves."""
    given = [[x.contiguous() for x in own] for own in (xs, directions)]
    lists = [*given, outs, moves, decays]
    for at in groups(lists, [x.shape for x in xs]):
        *batch, rank, width = xs[at[0]].shape
        rows, block = math.prod(batch) * rank, _block(width)
        launch(
            step_rows_kernel, select(lists, at), [], [rows] * len(at), width, rank, lr, decay,
            AHEAD=ahead, DECAYED=len(decays) > 0, MOVES=len(moves) > 0, BLOCK=block,
            num_warps=warps(max(1, block // EACH)),
        )  # fmt: skip
