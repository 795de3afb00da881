"""Block quantisation alone, and stochastic rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.native.arrays import (
    Arrays,
    block_counts,
    check_layout,
    check_map,
    check_scales,
    dtype_of,
    exactly,
    flat,
    same,
    sizes,
)
from lowrank_optim.ops.native.loader import (
    Blockwise,
    Rounding,
    run,
)
from lowrank_optim.ops.noise import check_places


def _blockwise(
    op: str,
    values: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    table: Tensor,
    layout: tuple[Sequence[int], Sequence[int], Sequence[int]],
) -> None:
    same(len(values), codes=codes, scales=scales)
    exactly(codes, torch.uint8, "codes")
    check_layout(layout, values)
    check_scales(scales, block_counts(*layout), "scales")
    sizes(codes, values, "codes")
    flat(values, "values")
    device = values[0].device
    arrays = Arrays(device)
    args = Blockwise(
        count=len(values),
        dtype=dtype_of(values, "values"),
        map=check_map(table, device).data_ptr(),
    )
    args.values, args.codes = arrays.pointers(values), arrays.pointers(codes)
    args.scales = arrays.pointers(scales)
    args.rows, args.cols, args.blocks = (arrays.int64(x) for x in layout)
    run(op, device, args)


def quantize_blockwise_(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """Nearest codes of ``x / scale`` with one scale, the largest magnitude, for each block.

    A block that holds an infinity or NaN gets that for a scale, and reads back as NaN.
    """
    if xs:
        _blockwise("quantize", xs, codes, scales, map, (rows, cols, blocks))


def dequantize_blockwise_(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
) -> None:
    """``out <- map[code] * scale``."""
    if outs:
        _blockwise("dequantize", outs, codes, scales, map, (rows, cols, blocks))


def stochastic_round_(
    xs: Sequence[Tensor],
    outs: Sequence[Tensor],
    seeds: Sequence[int],
    offsets: Sequence[int],
    widths: Sequence[int],
    row_strides: Sequence[int],
    column_strides: Sequence[int],
) -> None:
    """float32 to bfloat16, up or down without bias; the noise is a hash of position and seed."""
    if not xs:
        return
    same(len(xs), outs=outs, seeds=seeds)
    sizes(outs, xs, "outs")
    exactly(xs, torch.float32, "inputs")
    exactly(outs, torch.bfloat16, "outs")
    check_places(len(xs), offsets, widths, row_strides, column_strides)
    arrays = Arrays(xs[0].device)
    args = Rounding(count=len(xs), numels=arrays.int64([x.numel() for x in xs]))
    args.values, args.outs = arrays.pointers(xs), arrays.pointers(outs)
    args.seeds, args.offsets = arrays.uint32(seeds), arrays.uint32(offsets)
    args.widths = arrays.int64(widths)
    args.rows, args.columns = arrays.uint32(row_strides), arrays.uint32(column_strides)
    run("stochastic_round", xs[0].device, args)
