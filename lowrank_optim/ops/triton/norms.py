"""Norms of columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.triton.launch import guard, warps
from lowrank_optim.ops.triton.matrices import inside, tile, wide

_ROWS_CONTIGUOUS = (128, 32)
"""Tile of a row-major matrix: 32 columns are one full 128-byte line of float32, and a 4096-column
matrix is 128 programs without a second pass or atomics, whose sums would not be reproducible."""
_COLUMNS_CONTIGUOUS = (256, 16)
"""Tile of a transposed view: lines run down the columns."""


@triton.jit
def column_norm_kernel(
    x, out, m, n, xb, xi, xj, BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr
):
    """``out[b, j] = sqrt(sum_i x[b, i, j]^2)``; one program per BN columns, summed in row order."""
    b = tl.program_id(1).to(tl.int64)
    j0 = tl.program_id(0) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for i0 in range(0, m, BM):
        at = tile(x + b * xb, tl.full((), i0, tl.int64), j0, xi, xj, BM, BN, WIDE)
        entries = tl.load(at, inside(i0, j0, m, n, BM, BN), 0.0).to(tl.float32)
        total += entries * entries
    j = j0 + tl.arange(0, BN)
    tl.store(out + b * n + j, tl.sqrt_rn(tl.sum(total, axis=0)), j < n)


def column_norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """Norms ``(..., 1, n)`` in float32 of the columns of each ``x (..., m, n)``, any strides."""
    outs = []
    for x in xs:
        *batch, m, n = x.shape
        out = torch.empty(*batch, 1, n, dtype=torch.float32, device=x.device)
        outs.append(out)
        if out.numel() == 0:
            continue
        x3 = x.reshape(math.prod(batch), m, n)  # a copy only for leading dims that do not collapse
        down = x3.stride(1) == 1 and x3.stride(2) != 1
        bm, bn = _COLUMNS_CONTIGUOUS if down else _ROWS_CONTIGUOUS
        with guard(x):
            column_norm_kernel[(triton.cdiv(n, bn), x3.shape[0])](
                x3, out, m, n, *x3.stride(), BM=bm, BN=bn, WIDE=wide(bm, x3), num_warps=warps(8)
            )
    return outs
