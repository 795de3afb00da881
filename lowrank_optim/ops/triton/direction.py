"""Directions of the rules with float32 moments: one pass over gradient, moments and output."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.triton.elements import row_of, sign
from lowrank_optim.ops.triton.launch import (
    ELEMENTS,
    as_float,
    cdiv,
    float_bits,
    groups,
    launch,
    length,
    locate,
    number,
    packed,
    pointer,
    select,
)

_COLUMNS = ["count", "eps_bits", "width"]


@triton.jit(do_not_specialize=_COLUMNS)
def adamw_kernel(
    table, tensors, grad, exp_avg, exp_avg_sq, out, row_eps, row_scale, finite,
    count, eps_bits, width, weight1, beta2, weight2,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    ROW_EPS: tl.constexpr, ROW_SCALE: tl.constexpr, SOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``m += w1 (g - m);  v = b2 v + w2 g^2;  out = m / (sqrt(v) + eps)``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    grad = pointer(table, tensors, t, 1, grad, MANY, ALIGNED)
    exp_avg = pointer(table, tensors, t, 2, exp_avg, MANY, ALIGNED)
    exp_avg_sq = pointer(table, tensors, t, 3, exp_avg_sq, MANY, ALIGNED)
    out = pointer(table, tensors, t, 4, out, MANY, ALIGNED)
    size = length(table, tensors, t, 8, count, MANY, ALIGNED)
    start = part * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < size - start
    if ROW_EPS or ROW_SCALE:
        # its division is a call: before there is anything to keep across it
        row = row_of(start, lane, number(table, tensors, t, 10, width, MANY))
    g = tl.load(grad + start + lane, mask, 0.0).to(tl.float32)
    m = tl.load(exp_avg + start + lane, mask, 0.0)
    v = tl.load(exp_avg_sq + start + lane, mask, 0.0)
    m = m + weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    eps = as_float(number(table, tensors, t, 9, eps_bits, MANY))
    if ROW_EPS:
        row_eps = pointer(table, tensors, t, 5, row_eps, MANY, False)
        eps = tl.load(row_eps + row, mask, 1.0)
    direction = tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if ROW_SCALE:
        row_scale = pointer(table, tensors, t, 6, row_scale, MANY, False)
        direction = tl.load(row_scale + row, mask, 0.0) * direction
    keep = mask
    if SOUND:
        fine = tl.load(pointer(table, tensors, t, 7, finite, MANY, False)) != 0
        direction = tl.where(fine, direction, 0.0)
        keep = lane < tl.where(fine, size - start, 0)
    tl.store(exp_avg + start + lane, m, keep)
    tl.store(exp_avg_sq + start + lane, v, keep)
    tl.store(out + start + lane, direction.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["count"])
def moment_kernel(
    table, tensors, x, moment, out, finite, count, decay, weight, weight2,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    LION: tl.constexpr, SOUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``m = decay m + w x; out = m``, or Lion: ``out = sign(m + w (x - m)); m += w2 (x - m)``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    x = pointer(table, tensors, t, 1, x, MANY, ALIGNED)
    moment = pointer(table, tensors, t, 2, moment, MANY, ALIGNED)
    out = pointer(table, tensors, t, 3, out, MANY, ALIGNED)
    size = length(table, tensors, t, 5, count, MANY, ALIGNED)
    start = part * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < size - start
    g = tl.load(x + start + lane, mask, 0.0).to(tl.float32)
    m = tl.load(moment + start + lane, mask, 0.0)
    if LION:
        direction = sign(m + weight * (g - m))
        m = m + weight2 * (g - m)
    else:
        m = decay * m + weight * g
        direction = m
    keep = mask
    if SOUND:
        fine = tl.load(pointer(table, tensors, t, 4, finite, MANY, False)) != 0
        direction = tl.where(fine, direction, 0.0)
        keep = lane < tl.where(fine, size - start, 0)
    tl.store(moment + start + lane, m, keep)
    tl.store(out + start + lane, direction.to(out.dtype.element_ty), mask)


def adamw_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    finite: Sequence[Tensor],
) -> None:
    """Update both moments in place and write AdamW's direction, before bias correction."""
    packed(("exp_avgs", "exp_avg_sqs", "outs"), (exp_avgs, exp_avg_sqs, outs))
    lists = [
        [g.contiguous() for g in grads], exp_avgs, exp_avg_sqs, outs, row_eps, row_scale,
        finite,
    ]  # fmt: skip
    for at in groups(lists):
        sizes = [outs[i].numel() for i in at]
        widths = [outs[i].shape[-1] if outs[i].dim() else 1 for i in at]
        launch(
            adamw_kernel, select(lists, at), [sizes, [float_bits(eps[i]) for i in at], widths],
            [cdiv(n, ELEMENTS) for n in sizes], 1 - beta1, beta2, 1 - beta2,
            ROW_EPS=len(row_eps) > 0, ROW_SCALE=len(row_scale) > 0, SOUND=len(finite) > 0,
            BLOCK=ELEMENTS,
        )  # fmt: skip


def lion_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    finite: Sequence[Tensor],
) -> None:
    """Write Lion's direction and update the moment in place."""
    _moment(grads, exp_avgs, outs, (0.0, 1 - beta1, 1 - beta2), True, finite)


def moment_(
    xs: Sequence[Tensor],
    moments: Sequence[Tensor],
    outs: Sequence[Tensor],
    decay: float,
    weight: float,
    finite: Sequence[Tensor],
) -> None:
    """``m = decay m + weight x`` in place, and a copy of it in ``outs``."""
    _moment(xs, moments, outs, (decay, weight, 0.0), False, finite)


def _moment(
    xs: Sequence[Tensor],
    moments: Sequence[Tensor],
    outs: Sequence[Tensor],
    weights: tuple[float, float, float],
    lion: bool,
    finite: Sequence[Tensor],
) -> None:
    packed(("moments", "outs"), (moments, outs))
    lists = [[x.contiguous() for x in xs], moments, outs, finite]
    for at in groups(lists):
        sizes = [outs[i].numel() for i in at]
        launch(
            moment_kernel, select(lists, at), [sizes], [cdiv(n, ELEMENTS) for n in sizes],
            *weights, LION=lion, SOUND=len(finite) > 0, BLOCK=ELEMENTS,
        )  # fmt: skip
