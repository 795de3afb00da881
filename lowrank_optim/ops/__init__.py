"""The callers of the ops: lists in, lists out, whatever format the moments are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lowrank_optim.ops import native, triton
from lowrank_optim.ops import schema as _schema  # noqa: F401  (defines the ops)
from lowrank_optim.ops.composite import (
    add_,
    lift_add_,
    lift_add_term_,
    matrix_norm,
    project,
    stochastic_round,
    total_norms,
)
from lowrank_optim.ops.dispatch import backend
from lowrank_optim.ops.quant import Moment, Quantized
from lowrank_optim.ops.reference import TILE_ELEMENTS, keep_positive_

_ops = torch.ops.lowrank_optim
Moments = Sequence[Moment]


def _in_8bit(moments: Moments) -> TypeGuard[Sequence[Quantized]]:
    """Moments of one call are all kept alike."""
    return isinstance(moments[0], Quantized)


def _parts(moments: Sequence[Quantized]) -> tuple[list[Tensor], list[Tensor]]:
    return [x.codes for x in moments], [x.scales for x in moments]


def _layouts(moments: Sequence[Quantized]) -> tuple[list[int], list[int], list[int]]:
    rows, cols, blocks = zip(*(m.layout for m in moments), strict=True)
    return list(rows), list(cols), list(blocks)


class Rows(NamedTuple):
    """Per-row steps: ``out = scale m / (sqrt(v) + eps)``, one entry a row of each tensor."""

    eps: Sequence[Tensor] = ()
    scale: Sequence[Tensor] = ()


_NO_ROWS = Rows()


def adamw_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Moments,
    exp_avg_sqs: Moments,
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    rows: Rows = _NO_ROWS,
    finite: Sequence[Tensor] = (),
) -> None:
    """``m / (sqrt(v) + eps)`` into ``outs``; both moments updated where they are kept.

    Args:
        grads: float32, or narrower; any shapes.
        exp_avgs: m, in float32 tensors or all :class:`~lowrank_optim.ops.quant.Quantized`.
        exp_avg_sqs: v, likewise.
        outs: directions, in any floating dtype.
        beta1: decay of m.
        beta2: decay of v.
        eps: one a tensor.
        rows: steps of each row, where rows have ages of their own.
        finite: 0-d bools on the device; where False nothing changes and the direction is 0.
    """
    if not grads:
        return
    tail: tuple[Any, ...] = (beta1, beta2, list(eps), rows.eps, rows.scale, finite)
    if _in_8bit(exp_avgs) and _in_8bit(exp_avg_sqs):
        parts = (*_parts(exp_avgs), *_parts(exp_avg_sqs))
        maps = exp_avgs[0].map, exp_avg_sqs[0].map
        _ops.adamw_direction_8bit_(grads, *parts, outs, *maps, *_layouts(exp_avgs), *tail)
    else:
        _ops.adamw_direction_(grads, exp_avgs, exp_avg_sqs, outs, *tail)


def lion_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Moments,
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    finite: Sequence[Tensor] = (),
) -> None:
    """``sign(b1 m + (1 - b1) g)`` into ``outs``; the momentum follows with ``b2``."""
    if not grads:
        return
    if _in_8bit(exp_avgs):
        kept, table = _parts(exp_avgs), exp_avgs[0].map
        _ops.lion_direction_8bit_(
            grads, *kept, outs, table, *_layouts(exp_avgs), beta1, beta2, finite
        )
    else:
        _ops.lion_direction_(grads, exp_avgs, outs, beta1, beta2, finite)


def moment_(
    xs: Sequence[Tensor],
    moments: Moments,
    outs: Sequence[Tensor],
    decay: float,
    weight: float,
    finite: Sequence[Tensor] = (),
) -> None:
    """``m <- decay m + weight x``, into ``outs`` too."""
    if not xs:
        return
    if _in_8bit(moments):
        kept, table = _parts(moments), moments[0].map
        _ops.moment_8bit_(xs, *kept, outs, table, *_layouts(moments), decay, weight, finite)
    else:
        _ops.moment_(xs, moments, outs, decay, weight, finite)


def quantize_(xs: Sequence[Tensor], into: Sequence[Quantized]) -> None:
    """Write ``xs`` in 8 bits; all of one signedness.

    What has no sign are squares, and a positive one keeps a positive code, as in the directions.
    """
    if not xs:
        return
    _ops.quantize_blockwise_(xs, *_parts(into), into[0].map, *_layouts(into))
    if not into[0].signed:
        for x, (codes, scales, _), (_, cols, block) in zip(
            xs, into, (kept.layout for kept in into), strict=True
        ):
            if x.numel():
                keep_positive_(x.reshape(-1), codes.view(-1), scales, cols, block)


def dequantize(moments: Sequence[Quantized]) -> list[Tensor]:
    """The values in float32; all of one signedness."""
    outs = [torch.empty_like(m.codes, dtype=torch.float32) for m in moments]
    if moments:
        _ops.dequantize_blockwise_(*_parts(moments), outs, moments[0].map, *_layouts(moments))
    return outs


def lift_add_scaled_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    updates: Sequence[Tensor],
    lows: Sequence[Tensor],
    columns: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (P (a N - a R o c) + G o c)`` for each matrix: one GEMM and one pass.

    A column whose factor c is 0 gets exactly ``P (a N)``, whatever finite numbers R and G hold.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G ``(..., m, n)``, in W's dtype, any strides.
        bases: P ``(..., m, r)``.
        updates: N ``(..., r, n)``.
        lows: R ``(..., r, n)``.
        columns: c ``(..., 1, n)`` float32.
        decay: factor of the weights.
        lr: step size.
        scale: a.
        finite: 0-d bools on the device, one a tensor; where False, W stays as it is, bit for bit.
    """
    _ops.lift_add_scaled_(params, grads, bases, updates, lows, columns, decay, lr, scale, finite)


def lift_add_sign_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    updates: Sequence[Tensor],
    lows: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    finite: Sequence[Tensor] = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))`` for each matrix; arguments as above."""
    _ops.lift_add_sign_(params, grads, bases, updates, lows, decay, lr, scale, gain, finite)


def coordinate_add_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    updates: Sequence[Tensor],
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
    finite: Sequence[Tensor] = (),
) -> None:
    """Rows in ``indices``: ``W <- decay W - lr a N``; others: ``W <- decay W - lr gain f(G)``.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G ``(..., m, n)``, in W's dtype, any strides.
        indices: ``(..., r)`` int32, sorted.
        updates: N ``(..., r, n)``.
        decay: factor of the weights.
        lr: step size.
        scale: a.
        gain: factor of the free rows.
        free: f: ``"sign"``, ``"sgd"`` (G itself) or ``"none"``.
        finite: 0-d bools on the device, one a tensor; where False, W stays as it is, bit for bit.
    """
    _ops.coordinate_add_(params, grads, indices, updates, decay, lr, scale, gain, free, finite)


def coordinate_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
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
    """A whole step of rows: :func:`adamw_direction_` and :func:`coordinate_add_` in one pass.

    Rows in ``indices``: ``W <- decay W - step m / (sqrt(v) + eps)``; others: ``W <- decay W -
    free_step f(G)``. Native on the CPU; on an accelerator the reference.

    Args:
        params: W ``(..., m, n)``, any strides.
        grads: G ``(..., m, n)``, in W's dtype, any strides.
        indices: ``(..., r)`` int32, sorted.
        exp_avgs: m ``(..., r, n)`` float32, or wider with the reference; updated.
        exp_avg_sqs: v, likewise.
        beta1: decay of m.
        beta2: decay of v.
        eps: one a tensor.
        steps: factor of the direction, one a tensor.
        free_steps: factor of what moves the other rows, one a tensor.
        decay: factor of the weights.
        free: f: ``"sign"``, ``"sgd"`` (G itself) or ``"none"``.
    """
    if params:
        state = indices, exp_avgs, exp_avg_sqs
        scalars = beta1, beta2, eps, steps, free_steps, decay, free
        _ops.coordinate_adamw_(params, grads, *state, *scalars)


def cosine_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    indices: Sequence[Tensor],
    sources: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    rows: Rows,
    steps: Sequence[float],
    plan: Sequence[Tensor],
    basis: str,
    decay: float,
) -> None:
    """A whole step in cosines: :func:`cosine_project_`, AdamW and :func:`cosine_lift_add_`.

    Native on the CPU, where a tile of columns stays in the cache from its gradient to its weights;
    elsewhere the three in turn.

    Args:
        params: W ``(m, n)``, any strides; all of one m.
        grads: G ``(m, n)``, in W's dtype, any strides.
        indices: coefficients ``(r,)`` int32, sorted.
        sources: ``(r,)`` int32, where the moments of each stood, -1 for nowhere (zeros); none where
            all stay.
        exp_avgs: m ``(r, n)`` float32, or wider with the reference; updated.
        exp_avg_sqs: v, likewise.
        beta1: decay of m.
        beta2: decay of v.
        eps: one a tensor.
        rows: steps of each row, where rows have ages of their own.
        steps: factor of the direction, one a tensor.
        plan: of :class:`~lowrank_optim.ops.cosine.CosineTransform`.
        basis: "dct2" or "dct3".
        decay: factor of the weights.
    """
    if params:
        state = indices, sources, exp_avgs, exp_avg_sqs
        scalars = beta1, beta2, eps, *rows, steps, plan, basis, decay
        _ops.cosine_adamw_(params, grads, *state, *scalars)


def fuses_cosine(like: Tensor, n: int) -> bool:
    """Whether kernels serve the cosine ops for columns of length ``n``.

    Native ones have an FFT of their own, on the CPU; Triton's are what is around torch's.
    """
    chosen = backend(like)
    if chosen is native:
        return like.is_cpu and native.takes_length(n)
    return chosen is triton


column_norms = _ops.column_norms
cosine_lift_add_ = _ops.cosine_lift_add_
cosine_project_ = _ops.cosine_project_
cosine_scores = _ops.cosine_scores


def top_rows_(
    scores: Sequence[Tensor], indices: Sequence[Tensor], sources: Sequence[Tensor]
) -> None:
    """The indices of the r largest scores, ascending; among equals the lowest.

    Args:
        scores: ``(m,)``, not negative, finite.
        indices: ``(r,)`` int32: the old ones, ascending, and then the new.
        sources: ``(r,)`` int32, written: where each new one stood among the old, -1 for nowhere.
    """
    if scores:
        _ops.top_rows_(scores, indices, sources)


__all__ = [
    "TILE_ELEMENTS",
    "Rows",
    "adamw_direction_",
    "add_",
    "column_norms",
    "coordinate_adamw_",
    "coordinate_add_",
    "cosine_adamw_",
    "cosine_lift_add_",
    "cosine_project_",
    "cosine_scores",
    "dequantize",
    "fuses_cosine",
    "lift_add_",
    "lift_add_scaled_",
    "lift_add_sign_",
    "lift_add_term_",
    "lion_direction_",
    "matrix_norm",
    "moment_",
    "project",
    "quantize_",
    "stochastic_round",
    "top_rows_",
    "total_norms",
]
