"""The ops on moments as the package calls them: in float32, or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lowrank_optim.ops.quant import Moment, Quantized, layout
from lowrank_optim.ops.reference import keep_positive_
from lowrank_optim.ops.schema import calls as _ops
from lowrank_optim.ops.stacked import empty_like_all

Moments = Sequence[Moment]


def _in_8bit(moments: Moments) -> TypeGuard[Sequence[Quantized]]:
    """Moments of one call are all kept alike."""
    return isinstance(moments[0], Quantized)


def _parts(moments: Sequence[Quantized]) -> tuple[list[Tensor], list[Tensor]]:
    return [x.codes for x in moments], [x.scales for x in moments]


def _layouts(moments: Sequence[Quantized]) -> tuple[list[int], list[int], list[int]]:
    shapes = [m.codes.shape for m in moments]
    known = {shape: layout(shape) for shape in {*shapes}}  # most are alike
    rows, cols, blocks = zip(*[known[shape] for shape in shapes], strict=True)
    return list(rows), list(cols), list(blocks)


class Rows(NamedTuple):
    """Per-row steps: ``out = scale m / (sqrt(v) + eps)``, one entry a row of each tensor."""

    eps: Sequence[Tensor] = ()
    scale: Sequence[Tensor] = ()


_NO_ROWS = Rows()


def row_steps(
    ages: Sequence[Tensor], betas: tuple[float, float], eps: float, dtype: torch.dtype
) -> Rows:
    """What eps and the direction of each row are multiplied by; one of age 0 stays still.

    Args:
        ages: steps of each row, in float32.
        betas: decays of the moments.
        eps: of the rule.
        dtype: of the result.
    """
    outs: list[list[Tensor]] = [[], []]
    if ages and len({age.shape for age in ages}) == 1:
        outs = [empty_like_all(ages, ages[0].shape, dtype) for _ in range(2)]
    elif ages:
        outs = [[torch.empty_like(age, dtype=dtype) for age in ages] for _ in range(2)]
    if ages:
        _ops.row_steps_(ages, *outs, *betas, eps)
    return Rows(*([x if x.dim() == 1 else x.reshape(-1) for x in own] for own in outs))


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
        parts, table = _parts(exp_avgs), exp_avgs[0].map
        _ops.lion_direction_8bit_(
            grads, *parts, outs, table, *_layouts(exp_avgs), beta1, beta2, finite
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
        parts, table = _parts(moments), moments[0].map
        _ops.moment_8bit_(xs, *parts, outs, table, *_layouts(moments), decay, weight, finite)
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
            xs, into, (moment.layout for moment in into), strict=True
        ):
            if x.numel():
                keep_positive_(x.reshape(-1), codes.view(-1), scales, cols, block)


def dequantize(moments: Sequence[Quantized]) -> list[Tensor]:
    """The values in float32; all of one signedness."""
    outs = [torch.empty_like(m.codes, dtype=torch.float32) for m in moments]
    if moments:
        _ops.dequantize_blockwise_(*_parts(moments), outs, moments[0].map, *_layouts(moments))
    return outs
