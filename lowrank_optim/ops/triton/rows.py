"""Which rows of a fixed basis are used, and moments that follow: a launch for all matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.stacked import is_words
from lowrank_optim.ops.triton.coordinate import find
from lowrank_optim.ops.triton.launch import (
    cdiv,
    groups,
    launch,
    locate,
    next_power_of_2,
    number,
    pointer,
    select,
    signed32,
    warps,
)

PICKED = 512
"""Indices that a program looks up at once."""
MOVED, COLUMNS = 8192, 32
"""Entries of a program that moves rows, of all rows and at most so many columns: each is read
before one is written. 32 columns are 128 bytes of memory, of 256 rows at most."""


@triton.jit
def top_rows_kernel(
    table, tensors, score, index, source, new, finite, usable, m, rank,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    TOLD: tl.constexpr, PROBES: tl.constexpr, BLOCK: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """The r largest of m scores, and where each stood; a program has all scores of a matrix.

    The r-th largest is found bit by bit: numbers that are not negative are in the order of their
    bits. Among those that equal it the first ones are taken. ``new`` is room for their indices,
    while the old ones are still read.
    """
    t, _ = locate(table, tensors, MANY, DEPTH)
    score = pointer(table, tensors, t, 1, score, MANY, ALIGNED)
    index = pointer(table, tensors, t, 2, index, MANY, False)
    source = pointer(table, tensors, t, 3, source, MANY, False)
    new = pointer(table, tensors, t, 4, new, MANY, False)
    k = tl.arange(0, BLOCK)
    inside = k < m
    x = tl.load(score + k, inside, 0.0)
    bits = tl.where(inside, tl.abs(x).to(tl.int32, bitcast=True), -1)
    least = rank * 0
    for s in range(31):
        candidate = least + (1 << (30 - s))
        enough = tl.sum((bits >= candidate).to(tl.int32), axis=0) >= rank
        least = tl.where(enough, candidate, least)
    above = bits > least
    equal = bits == least
    wanted = rank - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))
    tl.store(new + tl.cumsum(chosen.to(tl.int32), 0) - 1, k, chosen)
    moved = rank
    if TOLD:
        total = tl.sum(x, axis=0)
        fine = total < float("inf")  # NaN is not
        moves = fine & (total > 0)
        tl.store(pointer(table, tensors, t, 5, finite, MANY, False), fine.to(tl.uint8))
        tl.store(pointer(table, tensors, t, 6, usable, MANY, False), moves.to(tl.uint8))
        moved = tl.where(moves, rank, 0)
    tl.debug_barrier()  # all of the new ones are there
    lane = tl.arange(0, PICKED)
    for start in range(0, rank, PICKED):
        i = start + lane
        stood, known = find(index, tl.load(new + i, i < rank, 0), rank, PROBES)
        stood = tl.where(known, stood, -1)
        tl.store(source + i, tl.where(i < moved, stood, i), i < rank)
    tl.debug_barrier()  # all of the old ones have been read
    for start in range(0, moved, PICKED):
        i = start + lane
        tl.store(index + i, tl.load(new + i, i < moved, 0), i < moved)


def top_rows_(
    scores: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    finite: Sequence[Tensor] = (),
    usable: Sequence[Tensor] = (),
) -> None:
    """The indices of the largest scores in place of ``indices``, and where each stood."""
    given, new = [x.contiguous() for x in scores], [torch.empty_like(x) for x in indices]
    lists = [given, indices, sources, new, finite, usable]
    for at in groups(lists, [(x.numel(), i.numel()) for x, i in zip(given, indices, strict=True)]):
        m, rank = given[at[0]].numel(), indices[at[0]].numel()
        block = next_power_of_2(m)
        launch(
            top_rows_kernel, select(lists, at), [], [1] * len(at), m, rank,
            TOLD=len(finite) > 0, PROBES=rank.bit_length(), BLOCK=block,
            PICKED=min(PICKED, next_power_of_2(max(1, rank))),
            num_warps=warps(min(16, max(4, block // 512))),
        )  # fmt: skip


@triton.jit(do_not_specialize=["width", "fill"])
def move_rows_kernel(
    table, tensors, x, source, width, fill, rank,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows of some columns from where they stood; a program has all rows, and touches what moves.

    Nothing but that is asked of ``source``: rows may change places.
    """
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    source = pointer(table, tensors, t, 2, source, MANY, False)
    columns = number(table, tensors, t, 3, width, MANY)
    nothing = number(table, tensors, t, 4, fill, MANY).to(x.dtype.element_ty)
    i = tl.arange(0, BR)
    j = part * BC + tl.arange(0, BC)
    come = tl.load(source + i, i < rank, 0)
    mask = ((i < rank) & (come != i))[:, None] & (j < columns)[None, :]
    stood = (come >= 0) & (come < rank)  # no other memory is read, whatever it says
    old = x + come.to(tl.int64)[:, None] * columns + j[None, :]
    new = tl.where(stood[:, None], tl.load(old, mask & stood[:, None], 0), nothing)
    tl.debug_barrier()  # all rows have been read
    tl.store(x + i.to(tl.int64)[:, None] * columns + j[None, :], new, mask)


def _as_units(x: Tensor, fill: int) -> tuple[Tensor, int]:
    """Rows ``(r, k)`` as integers of four bytes, where they are whole ones; else as bytes."""
    if is_words(x, x.shape[-1]):
        return x.view(torch.int32), signed32(fill * 0x01010101)
    return x.view(torch.uint8), fill


def move_rows_(xs: Sequence[Tensor], sources: Sequence[Tensor], fills: Sequence[int]) -> None:
    """Rows of each ``(r, k)`` from where they stood; ``fill`` where that is nowhere."""
    pairs = [_as_units(x, fill) for x, fill in zip(xs, fills, strict=True)]
    lists = [[x for x, _ in pairs], [source.contiguous() for source in sources]]
    for at in groups(lists, [x.shape[0] for x in xs]):
        rank = xs[at[0]].shape[0]
        rows = next_power_of_2(rank)
        columns = max(1, min(COLUMNS, MOVED // rows))
        widths = [lists[0][i].shape[-1] for i in at]
        launch(
            move_rows_kernel, select(lists, at), [widths, [pairs[i][1] for i in at]],
            [cdiv(width, columns) for width in widths], rank,
            BR=rows, BC=columns, num_warps=warps(8),
        )  # fmt: skip
