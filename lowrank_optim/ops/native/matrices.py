"""Column norms and the fused applies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_optim.ops import reference
from lowrank_optim.ops.cosine import check_name
from lowrank_optim.ops.native.arrays import (
    DTYPES,
    Arrays,
    dtype_of,
    exactly,
    floating,
    on,
    same,
)
from lowrank_optim.ops.native.loader import (
    Apply,
    Coordinate,
    CoordinateStep,
    Norms,
    run,
)

FREE = {"none": 0, "sign": 1, "sgd": 2}

TILE_ELEMENTS = 1 << 18
"""Elements of the buffer that a GEMM writes and a fused apply reads, while it is in the cache."""


def _matrices(xs: Iterable[Tensor]) -> list[Tensor]:
    """Every 2-D matrix of a list of ``(..., m, n)``; views, whatever the strides."""
    matrices: list[Tensor] = []
    for x in xs:
        _unbind(x, matrices)
    return matrices


def _unbind(x: Tensor, into: list[Tensor]) -> None:
    if x.dim() <= 2:
        into.append(x)
        return
    for part in x.unbind(0):
        _unbind(part, into)


def _flags(finite: Sequence[Tensor], W: Sequence[Tensor]) -> list[Tensor]:
    """One flag per matrix of a list of batches; none where all are finite."""
    if not finite:
        return []
    same(len(W), finite=finite)
    if any(s.dtype != torch.bool or s.numel() != 1 for s in finite):
        raise TypeError("finite: one bool per tensor")
    return [s for s, w in zip(finite, W, strict=True) for _ in range(math.prod(w.shape[:-2]))]


def _idle(flag: Tensor | None) -> bool:
    """Whether the host knows that there is nothing to do, without waiting for a device."""
    return flag is not None and flag.device.type == "cpu" and not flag


def column_norms(xs: Sequence[Tensor]) -> list[Tensor]:
    """``(..., 1, n)`` float32: the norm of each column; sums in float64, so nothing overflows."""
    if not xs:
        return []
    norms = [
        torch.empty((*x.shape[:-2], 1, x.shape[-1]), dtype=torch.float32, device=x.device)
        for x in xs
    ]
    matrices, outs = _matrices(xs), _matrices(norms)
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


def _stored(w: Tensor) -> bool:
    """Whether the rows of ``w`` are how it is stored; else its columns are."""
    return w.stride(1) <= w.stride(0)


def _shape_check(
    w: Tensor, g: Tensor, p: Tensor, lows: Sequence[Tensor], flag: Tensor | None
) -> None:
    on(w.device, [g, p, *lows, *([] if flag is None else [flag])])
    m, n = w.shape
    r = p.shape[1]
    if g.shape != w.shape or p.shape[0] != m or any(x.shape != (r, n) for x in lows):
        shapes = [tuple(x.shape) for x in (w, g, p, *lows)]
        raise ValueError(f"shapes do not fit: W, G, P and low-rank {shapes}")


def _tiles(w: Tensor, buffers: int) -> tuple[list[Tensor], int]:
    """Buffers of one tile together within `TILE_ELEMENTS`, and the rows of a tile."""
    rows, cols = w.shape
    step = max(1, min(rows, TILE_ELEMENTS // (buffers * max(cols, 1))))
    return [torch.empty(step, cols, dtype=w.dtype, device=w.device) for _ in range(buffers)], step


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
) -> None:
    """``W <- decay W - lr (P (a N - a R c) + G c)``: a GEMM into a tile, then one pass over it.

    The GEMM has the dtype of W, as `lift_add_`; the pass is in float32 and rounds W once.
    """
    if not W:
        return
    same(len(W), G=G, P=P, N=N, R=R, columns=columns)
    floating([*P, *N, *R], "bases and coordinates")
    dtype = dtype_of(W, "weights")
    dtype_of([*W, *G], "weights and gradients")
    args = Apply(decay=decay, lr=lr, weight_dtype=dtype, grad_dtype=dtype, low_dtype=dtype)
    matrices = zip(*(_matrices(x) for x in (W, G, P, N, R, columns)), strict=True)
    flags = _flags(finite, W) or itertools.repeat(None)
    for (w, g, p, n, r, c), flag in zip(matrices, flags, strict=False):
        _shape_check(w, g, p, (n, r), flag)
        if c.shape != (1, w.shape[1]) or c.dtype != torch.float32:
            raise ValueError(f"columns: float32 (1, {w.shape[1]}), got {c.dtype} {tuple(c.shape)}")
        if w.numel() == 0 or _idle(flag):
            continue
        args.finite = flag.data_ptr() if flag is not None else None
        c = c.contiguous()
        x = torch.addcmul(n.float(), r.float(), c, value=-1.0).mul_(scale).to(w.dtype)
        left, right = p.to(w.dtype), x
        by_rows = _stored(w)
        if not by_rows:
            w, g, left, right = w.t(), g.t(), x.t(), left.t()
        (tile,), step = _tiles(w, 1)
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
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))``: two GEMMs into tiles, then one pass."""
    if not W:
        return
    same(len(W), G=G, P=P, N=N, R=R)
    floating([*P, *N, *R], "bases and coordinates")
    dtype = dtype_of(W, "weights")
    dtype_of([*W, *G], "weights and gradients")
    args = Apply(decay=decay, lr=lr, scale=scale, gain=gain)
    args.weight_dtype = args.grad_dtype = args.low_dtype = dtype
    matrices = zip(*(_matrices(x) for x in (W, G, P, N, R)), strict=True)
    flags = _flags(finite, W) or itertools.repeat(None)
    for (w, g, p, n, r), flag in zip(matrices, flags, strict=False):
        _shape_check(w, g, p, (n, r), flag)
        if w.numel() == 0 or _idle(flag):
            continue
        args.finite = flag.data_ptr() if flag is not None else None
        by_rows = _stored(w)
        p, n, r = p.to(w.dtype), n.to(w.dtype), r.to(w.dtype)
        if not by_rows:
            w, g = w.t(), g.t()
        (first, second), step = _tiles(w, 2)
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


def coordinate_add_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    index: Sequence[Tensor],
    N: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
    finite: Sequence[Tensor] = (),
) -> None:
    """Rows in ``index``: ``W <- decay W - lr a N[k]``; others ``W <- decay W - lr gain f(G)``."""
    check_name("free", free, [*FREE])
    if not W:
        return
    same(len(W), G=G, index=index, N=N)
    floating(N, "updates")
    dtype_of([*W, *G], "weights and gradients")
    ws, gs, lows = _matrices(W), _matrices(G), [x.float() for x in _matrices(N)]
    picks = _picks(index, W)
    _fit(ws, gs, picks, lows)
    flags: Sequence[Tensor | None] = _flags(finite, W) or [None] * len(ws)
    scalars = {"decay": decay, "lr": lr, "scale": scale, "gain": gain, "free_rule": FREE[free]}
    calls = list(zip(ws, gs, picks, lows, flags, strict=True))
    _coordinates([x for x in calls if _along(x[0], x[3])], scalars)
    for w, g, k, low, flag in calls:
        if not _along(w, low):
            for here, own in _strips(low):
                _coordinates([(w[:, here], g[:, here], k, own, flag)], scalars)


def _picks(index: Sequence[Tensor], W: Sequence[Tensor]) -> list[Tensor]:
    """The rows of every matrix of a list of batches, which may share them."""
    picks: list[Tensor] = []
    for k, w in zip(index, W, strict=True):
        if k.dtype != torch.int32:
            raise TypeError(f"index must be int32, got {k.dtype}")
        batch = w.shape[:-2]
        rows = k.contiguous().expand(*batch, k.shape[-1]).reshape(math.prod(batch), k.shape[-1])
        picks += rows.unbind(0)
    return picks


def _fit(
    ws: Sequence[Tensor], gs: Sequence[Tensor], picks: Sequence[Tensor], lows: Sequence[Tensor]
) -> None:
    for w, g, k, low in zip(ws, gs, picks, lows, strict=True):
        if g.shape != w.shape or low.shape != (k.shape[0], w.shape[1]):
            shapes = [tuple(x.shape) for x in (w, g, k, low)]
            raise ValueError(f"shapes do not fit: W, G, index and N {shapes}")


def coordinate_adamw_(
    W: Sequence[Tensor],
    G: Sequence[Tensor],
    index: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    steps: Sequence[float],
    free_steps: Sequence[float],
    decay: float,
    free: str,
) -> None:
    """Rows in ``index`` by AdamW, moments updated; others ``W <- decay W - free_step f(G)``.

    On the CPU; elsewhere the reference.
    """
    check_name("free", free, [*FREE])
    if not W:
        return
    if W[0].device.type != "cpu":
        scalars = beta1, beta2, eps, steps, free_steps, decay, free
        reference.coordinate_adamw_(W, G, index, exp_avgs, exp_avg_sqs, *scalars)
        return
    same(len(W), G=G, index=index, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    same(len(W), eps=eps, steps=steps, free_steps=free_steps)
    dtype = dtype_of([*W, *G], "weights and gradients")
    ws, gs, picks = _matrices(W), _matrices(G), _picks(index, W)
    arrays = Arrays(W[0].device)
    args = CoordinateStep(count=len(ws), beta1=beta1, beta2=beta2, decay=decay, dtype=dtype)
    args.free_rule = FREE[free]
    for name, moments in (("first", exp_avgs), ("second", exp_avg_sqs)):
        exactly(moments, torch.float32, name)
        own = _matrices(moments)
        _fit(ws, gs, picks, own)
        setattr(args, name, arrays.pointers(own))
    args.weights, args.grads = arrays.pointers(ws), arrays.pointers(gs)
    args.index, args.picked = arrays.pointers(picks), arrays.int64([k.shape[0] for k in picks])
    args.rows, args.cols = (arrays.int64([w.shape[d] for w in ws]) for d in (0, 1))
    args.weight_rows, args.weight_cols = (arrays.int64([w.stride(d) for w in ws]) for d in (0, 1))
    args.grad_rows, args.grad_cols = (arrays.int64([g.stride(d) for g in gs]) for d in (0, 1))
    for name, values in (("eps", eps), ("steps", steps), ("free_steps", free_steps)):
        each = [x for x, w in zip(values, W, strict=True) for _ in range(math.prod(w.shape[:-2]))]
        setattr(args, name, arrays.float32(each))
    indices = ((k, w.shape[0], 0) for k, w in zip(picks, ws, strict=True))
    run("coordinate_adamw", W[0].device, args, indices)


_Call = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""W, G, index and N of one matrix, and its flag."""


def _along(w: Tensor, low: Tensor) -> bool:
    """Whether N is stored the way that W is: W is passed over in the direction it is stored in.

    Strides of a power of two across it would evict each other from the cache.
    """
    return _stored(w) or low.stride(0) == 1 or low.shape[0] <= 1


def _strips(low: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of ``low (r, n)``, stored by columns in one buffer of a tile."""
    r, n = low.shape
    step = max(1, min(n, TILE_ELEMENTS // r))
    buffer = low.new_empty(step, r)
    for start in range(0, n, step):
        here = slice(start, min(start + step, n))
        own = buffer[: here.stop - start].copy_(low[:, here].t()).t()
        yield here, own


def _coordinates(calls: Sequence[_Call], scalars: dict[str, Any]) -> None:
    if not calls:
        return
    ws, gs, picks, lows, flags = zip(*calls, strict=True)
    arrays, dtype = Arrays(ws[0].device), DTYPES[ws[0].dtype]
    args = Coordinate(count=len(ws), weight_dtype=dtype, grad_dtype=dtype, **scalars)
    args.weights, args.grads = arrays.pointers(ws), arrays.pointers(gs)
    args.index, args.lows = arrays.pointers(picks), arrays.pointers(lows)
    args.picked = arrays.int64([k.shape[0] for k in picks])
    args.rows, args.cols = (arrays.int64([w.shape[d] for w in ws]) for d in (0, 1))
    args.weight_rows, args.weight_cols = (arrays.int64([w.stride(d) for w in ws]) for d in (0, 1))
    args.grad_rows, args.grad_cols = (arrays.int64([g.stride(d) for g in gs]) for d in (0, 1))
    args.low_rows, args.low_cols = (arrays.int64([x.stride(d) for x in lows]) for d in (0, 1))
    if flags[0] is not None:
        args.finite = arrays.pointers(flags)
    indices = ((k, w.shape[0], 0) for k, w in zip(picks, ws, strict=True))
    run("coordinate_add", ws[0].device, args, indices)
