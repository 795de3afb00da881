"""Norms of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.stacked import empty_like_all
from lowrank_optim.ops.triton.launch import (
    cdiv,
    groups,
    launch,
    locate,
    pointer,
    select,
    warps,
)
from lowrank_optim.ops.triton.matrices import batch_strides, inside, tile, wide

_ROWS_CONTIGUOUS = (128, 32)
"""Tile of a row-major matrix: 32 columns are one full 128-byte line of float32, and a 4096-column
matrix is 128 programs without a second pass or atomics, whose sums would not be reproducible."""
_COLUMNS_CONTIGUOUS = (256, 16)
"""Tile of a transposed view: lines run down the columns."""


@triton.jit
def column_norm_kernel(
    table, tensors, x, out, m, n, xb, xi, xj,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out[b, j] = sqrt(sum_i x[b, i, j]^2)``; one program per BN columns, summed in row order."""
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    out = pointer(table, tensors, t, 2, out, MANY, ALIGNED)
    across = tl.cdiv(n, BN)
    b = part // across
    j0 = (part % across).to(tl.int32) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for i0 in range(0, m, BM):
        at = tile(x + b * xb, tl.full((), i0, tl.int64), j0, xi, xj, BM, BN, WIDE)
        entries = tl.load(at, inside(i0, j0, m, n, BM, BN), 0.0).to(tl.float32)
        total += entries * entries
    j = j0 + tl.arange(0, BN)
    tl.store(out + b * n + j, tl.sqrt_rn(tl.sum(total, axis=0)), j < n)


def column_norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """Norms ``(..., 1, n)`` in float32 of the columns of each ``x (..., m, n)``, any strides.

    A launch for all of one shape and strides, which the code is compiled for.
    """
    # a copy only for leading dims that do not collapse
    views = [x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in xs]
    alike = [(x.shape, x.stride()) for x in views]
    shapes = [(*x.shape[:-2], 1, x.shape[-1]) for x in xs]
    if len(set(shapes)) == 1:
        outs = empty_like_all(xs, shapes[0], torch.float32)
    else:
        outs = [x.new_empty(own, dtype=torch.float32) for x, own in zip(xs, shapes, strict=True)]
    for at in groups([outs, views], alike):
        first = views[at[0]]
        *batch, m, n = first.shape
        down = first.stride(-2) == 1 and first.stride(-1) != 1
        bm, bn = _COLUMNS_CONTIGUOUS if down else _ROWS_CONTIGUOUS
        launch(
            column_norm_kernel, select([views, outs], at), [],
            [cdiv(n, bn) * math.prod(batch)] * len(at), m, n, *batch_strides(first, batch),
            BM=bm, BN=bn, WIDE=wide(bm, first), num_warps=warps(8), enable_fp_fusion=True,
        )  # fmt: skip
    return outs
