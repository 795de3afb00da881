"""Norms of columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.native.arrays import Arrays, dtype_of
from lowrank_optim.ops.native.loader import Norms, run
from lowrank_optim.ops.native.matrices import matrices_of


def column_norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """``(..., 1, n)`` float32: the norm of each column; sums in float64, so nothing overflows."""
    if not xs:
        return []
    norms = [
        torch.empty((*x.shape[:-2], 1, x.shape[-1]), dtype=torch.float32, device=x.device)
        for x in xs
    ]
    matrices, outs = matrices_of(xs), matrices_of(norms)
    if not matrices:
        return norms
    arrays = Arrays(xs[0].device)
    args = Norms(count=len(matrices), dtype=dtype_of(xs, "matrices"))
    args.values, args.outs = arrays.pointers(matrices), arrays.pointers(outs)
    args.rows = arrays.int64([x.shape[0] for x in matrices])
    args.cols = arrays.int64([x.shape[1] for x in matrices])
    args.row_strides = arrays.int64([x.stride(0) for x in matrices])
    args.col_strides = arrays.int64([x.stride(1) for x in matrices])
    run("column_norms", xs[0].device, args)
    return norms
