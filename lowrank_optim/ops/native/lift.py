"""Updates lifted by a GEMM of torch's into a tile, and applied by one pass over it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops.native.arrays import DTYPES, dtype_of, floating, from_host, on, same
from lowrank_optim.ops.native.loader import Apply, run
from lowrank_optim.ops.native.matrices import (
    flags_of,
    matrices_of,
    skipped,
    stored_by_rows,
    tile_length,
)
from lowrank_optim.ops.products import product_dtype


def _check_shapes(
    w: Tensor, g: Tensor, p: Tensor, lows: Sequence[Tensor], flag: Tensor | None
) -> None:
    on(w.device, [g, p, *lows, *([] if flag is None else [flag])])
    m, n = w.shape
    r = p.shape[1]
    if g.shape != w.shape or p.shape[0] != m or any(x.shape != (r, n) for x in lows):
        shapes = [tuple(x.shape) for x in (w, g, p, *lows)]
        raise ValueError(f"shapes do not fit: W, G, P and low-rank {shapes}")


def _tiles(w: Tensor, buffers: int, dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Buffers of one tile together as large as a tile, and their rows."""
    rows, cols = w.shape
    step = tile_length(rows, buffers * cols)
    return [torch.empty(step, cols, dtype=dtype, device=w.device) for _ in range(buffers)], step


def _apply(op: str, w: Tensor, g: Tensor, low: Tensor, other: Tensor, args: Any) -> None:
    args.rows, args.cols = w.shape
    args.weight, args.weight_row, args.weight_col = w.data_ptr(), w.stride(0), w.stride(1)
    args.grad, args.grad_row, args.grad_col = g.data_ptr(), g.stride(0), g.stride(1)
    args.low, args.other, args.low_row = low.data_ptr(), other.data_ptr(), low.stride(0)
    run(op, w.device, args)


def lift_add_scaled_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    P: Sequence[Tensor],
    N: Sequence[Tensor],
    R: Sequence[Tensor],
    columns: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    finite: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (P (a N - a R c) + G c)``: a GEMM into a tile, then one pass over it.

    The GEMM is in `product_dtype` of W; the pass is in float32 and rounds W once.
    """
    if not W:
        return
    from_host(steps=steps, decays=decays)
    same(len(W), G=G, P=P, N=N, R=R, columns=columns)
    floating([*P, *N, *R], "bases and coordinates")
    dtype = dtype_of(W, "weights")
    dtype_of([*W, *G], "weights and gradients")
    product = product_dtype(W[0].dtype)
    args = Apply(decay=decay, lr=lr, weight_dtype=dtype, grad_dtype=dtype)
    args.low_dtype = DTYPES[product]
    matrices = zip(*(matrices_of(x) for x in (W, G, P, N, R, columns)), strict=True)
    flags = flags_of(finite, W) or itertools.repeat(None)
    for (w, g, p, n, r, c), flag in zip(matrices, flags, strict=False):
        _check_shapes(w, g, p, (n, r), flag)
        if c.shape != (1, w.shape[1]) or c.dtype != torch.float32:
            raise ValueError(f"columns: float32 (1, {w.shape[1]}), got {c.dtype} {tuple(c.shape)}")
        if w.numel() == 0 or skipped(flag):
            continue
        args.finite = flag.data_ptr() if flag is not None else None
        c = c.contiguous()
        x = torch.addcmul(n.float(), r.float(), c, value=-1.0).mul_(scale).to(product)
        left, right = p.to(product), x
        by_rows = stored_by_rows(w)
        if not by_rows:
            w, g, left, right = w.t(), g.t(), x.t(), left.t()
        (tile,), step = _tiles(w, 1, product)
        args.factor_row, args.factor_col = (0, 1) if by_rows else (1, 0)
        for start in range(0, w.shape[0], step):
            stop = min(start + step, w.shape[0])
            low = torch.mm(left[start:stop], right, out=tile[: stop - start])
            args.factor = c.data_ptr() + (0 if by_rows else 4 * start)
            _apply("apply_scaled", w[start:stop], g[start:stop], low, low, args)
        del tile, low, x, left, right  # before those of the next expert are made


def lift_add_sign_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    P: Sequence[Tensor],
    N: Sequence[Tensor],
    R: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    finite: Sequence[Tensor] = (),
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))``: two GEMMs into tiles, then one pass."""
    if not W:
        return
    from_host(steps=steps, decays=decays, gains=gains)
    same(len(W), G=G, P=P, N=N, R=R)
    floating([*P, *N, *R], "bases and coordinates")
    dtype = dtype_of(W, "weights")
    dtype_of([*W, *G], "weights and gradients")
    args = Apply(decay=decay, lr=lr, scale=scale, gain=gain)
    product = product_dtype(W[0].dtype)
    args.weight_dtype = args.grad_dtype = dtype
    args.low_dtype = DTYPES[product]
    matrices = zip(*(matrices_of(x) for x in (W, G, P, N, R)), strict=True)
    flags = flags_of(finite, W) or itertools.repeat(None)
    for (w, g, p, n, r), flag in zip(matrices, flags, strict=False):
        _check_shapes(w, g, p, (n, r), flag)
        if w.numel() == 0 or skipped(flag):
            continue
        args.finite = flag.data_ptr() if flag is not None else None
        by_rows = stored_by_rows(w)
        p, n, r = p.to(product), n.to(product), r.to(product)
        if not by_rows:
            w, g = w.t(), g.t()
        (first, second), step = _tiles(w, 2, product)
        for start in range(0, w.shape[0], step):
            stop = min(start + step, w.shape[0])
            rows = slice(start, stop)
            pairs = (
                [(p[rows], n), (p[rows], r)]
                if by_rows
                else [(n.t()[rows], p.t()), (r.t()[rows], p.t())]
            )
            low = torch.mm(*pairs[0], out=first[: stop - start])
            other = torch.mm(*pairs[1], out=second[: stop - start])
            _apply("apply_sign", w[rows], g[rows], low, other, args)
        del first, second, low, other, pairs  # before those of the next expert are made
