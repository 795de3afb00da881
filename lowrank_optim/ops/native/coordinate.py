"""Updates of some rows, with a rule without state for the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    from_host,
    same,
)
from lowrank_optim.ops.native.loader import Coordinate, CoordinateStep, run
from lowrank_optim.ops.native.matrices import flags_of, matrices_of, stored_by_rows, tile_length

FREE = {"none": 0, "sign": 1, "sgd": 2}


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
    steps: Sequence[Tensor] = (),
    decays: Sequence[Tensor] = (),
    gains: Sequence[Tensor] = (),
) -> None:
    """Rows in ``index``: ``W <- decay W - lr a N[k]``; others ``W <- decay W - lr gain f(G)``."""
    check_name("free", free, [*FREE])
    if not W:
        return
    from_host(steps=steps, decays=decays, gains=gains)
    same(len(W), G=G, index=index, N=N)
    floating(N, "updates")
    dtype_of([*W, *G], "weights and gradients")
    ws, gs, lows = matrices_of(W), matrices_of(G), [x.float() for x in matrices_of(N)]
    picks = _indices_of(index, W)
    _check_shapes(ws, gs, picks, lows)
    flags: Sequence[Tensor | None] = flags_of(finite, W) or [None] * len(ws)
    scalars = {"decay": decay, "lr": lr, "scale": scale, "gain": gain, "free_rule": FREE[free]}
    calls = list(zip(ws, gs, picks, lows, flags, strict=True))
    _run([x for x in calls if _stored_alike(x[0], x[3])], scalars)
    for w, g, k, low, flag in calls:
        if not _stored_alike(w, low):
            for columns, strip in _strips(low):
                _run([(w[:, columns], g[:, columns], k, strip, flag)], scalars)


def _indices_of(index: Sequence[Tensor], W: Sequence[Tensor]) -> list[Tensor]:
    """The rows of every matrix of a list of batches, which may share them."""
    picks: list[Tensor] = []
    for k, w in zip(index, W, strict=True):
        if k.dtype != torch.int32:
            raise TypeError(f"index must be int32, got {k.dtype}")
        batch = w.shape[:-2]
        rows = k.contiguous().expand(*batch, k.shape[-1]).reshape(math.prod(batch), k.shape[-1])
        picks += rows.unbind(0)
    return picks


def _check_shapes(
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
    ws, gs, picks = matrices_of(W), matrices_of(G), _indices_of(index, W)
    arrays = Arrays(W[0].device)
    args = CoordinateStep(count=len(ws), beta1=beta1, beta2=beta2, decay=decay, dtype=dtype)
    args.free_rule = FREE[free]
    for name, moments in (("first", exp_avgs), ("second", exp_avg_sqs)):
        exactly(moments, torch.float32, name)
        separate = matrices_of(moments)
        _check_shapes(ws, gs, picks, separate)
        setattr(args, name, arrays.pointers(separate))
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


def _stored_alike(w: Tensor, low: Tensor) -> bool:
    """Whether N is stored the way that W is: W is passed over in the direction it is stored in.

    Strides of a power of two across it would evict each other from the cache.
    """
    return stored_by_rows(w) or low.stride(0) == 1 or low.shape[0] <= 1


def _strips(low: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of ``low (r, n)``, stored by columns in one buffer of a tile."""
    r, n = low.shape
    step = tile_length(n, r)
    buffer = low.new_empty(step, r)
    for start in range(0, n, step):
        columns = slice(start, min(start + step, n))
        yield columns, buffer[: columns.stop - start].copy_(low[:, columns].t()).t()


def _run(calls: Sequence[_Call], scalars: dict[str, Any]) -> None:
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
