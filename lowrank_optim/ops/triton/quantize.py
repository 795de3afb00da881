"""Block quantisation to 256 values and back."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.triton.elements import block_layout, block_scale, requantize
from lowrank_optim.ops.triton.launch import (
    cdiv,
    groups,
    launch,
    locate,
    next_power_of_2,
    number,
    packed,
    pointer,
    select,
)

BLOCKS = 4
"""Blocks of a program: with 256 lanes as many elements as the other elementwise kernels have."""


def lanes(blocks: Sequence[int]) -> list[int]:
    """Tile widths: the next power of two, in which the block is masked."""
    return [next_power_of_2(b) for b in blocks]


def block_programs(rows: Sequence[int], cols: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Programs per tensor."""
    return [cdiv(r * cdiv(c, b), BLOCKS) for r, c, b in zip(rows, cols, blocks, strict=True)]


@triton.jit(do_not_specialize=["rows", "cols", "block"])
def quantize_kernel(
    table, tensors, x, codes, scales, rows, cols, block, entries,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``scale = max |x|`` of the block, ``code`` of the entry nearest to ``x / scale``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    lane = tl.arange(0, LANES)
    rows = number(table, tensors, t, 4, rows, MANY)
    cols = number(table, tensors, t, 5, cols, MANY)
    block = number(table, tensors, t, 6, block, MANY)
    b, start, live, mask = block_layout(part, rows, cols, block, lane, COUNT)
    at = start[:, None] + lane[None, :]
    x = tl.load(pointer(table, tensors, t, 1, x, MANY, ALIGNED) + at, mask, 0.0).to(tl.float32)
    scale = block_scale(x)
    tl.store(pointer(table, tensors, t, 3, scales, MANY, False) + b, scale, live)
    codes = pointer(table, tensors, t, 2, codes, MANY, ALIGNED)
    tl.store(codes + at, requantize(x, scale, entries), mask)


@triton.jit(do_not_specialize=["rows", "cols", "block"])
def dequantize_kernel(
    table, tensors, codes, scales, out, rows, cols, block, entries,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``out = map[code] * scale``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    lane = tl.arange(0, LANES)
    rows = number(table, tensors, t, 4, rows, MANY)
    cols = number(table, tensors, t, 5, cols, MANY)
    block = number(table, tensors, t, 6, block, MANY)
    b, start, live, mask = block_layout(part, rows, cols, block, lane, COUNT)
    at = start[:, None] + lane[None, :]
    code = tl.load(pointer(table, tensors, t, 1, codes, MANY, ALIGNED) + at, mask, 0)
    scale = tl.load(pointer(table, tensors, t, 2, scales, MANY, False) + b, live, 0.0)
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED)
    x = tl.load(entries + code.to(tl.int32)) * scale[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask)


def quantize_blockwise_(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """Quantise each tensor, read as ``rows`` rows of ``cols`` elements, in blocks of a row."""
    packed(("codes", "scales"), (codes, scales))
    lists = [[x.contiguous() for x in xs], codes, scales]
    _run(quantize_kernel, lists, map, (rows, cols, blocks))


def dequantize_blockwise_(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """The inverse of `quantize_blockwise_`, up to the quantisation."""
    packed(("codes", "scales", "outs"), (codes, scales, outs))
    _run(dequantize_kernel, [codes, scales, outs], map, (rows, cols, blocks))


def _run(
    kernel: object,
    lists: list[Sequence[Tensor]],
    entries: Tensor,
    layouts: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> None:
    for at in groups(lists, lanes(layouts[2])):
        layout = select(layouts, at)
        launch(
            kernel, select(lists, at), layout, block_programs(*layout), entries,
            COUNT=BLOCKS, LANES=lanes(layouts[2])[at[0]],
        )  # fmt: skip
