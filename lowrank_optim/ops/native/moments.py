"""Directions and moments, in float32 and in 8 bits."""

from __future__ import annotations

import math
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
    numels,
    same,
    sizes,
)
from lowrank_optim.ops.native.loader import Update, run


def _update(
    op: str,
    grads: Sequence[Tensor],
    outs: Sequence[Tensor],
    a: float,
    b: float,
    finite: Sequence[Tensor],
    moments: dict[str, Sequence[Tensor]],
    *,
    maps: dict[str, Tensor] | None = None,
    layout: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
    eps: Sequence[float] | None = None,
    row_eps: Sequence[Tensor] = (),
    row_scale: Sequence[Tensor] = (),
) -> None:
    """One call of an op over ``lro_update``, after the checks that keep it inside its buffers."""
    count = len(grads)
    if count == 0:
        return
    same(count, outs=outs, **moments)
    known = numels(grads)
    sizes(outs, grads, "outs", known)
    if layout is not None:
        check_layout(layout, grads)
    arrays = Arrays(grads[0].device)
    args = Update(count=count, a=a, b=b)
    args.grad_dtype, args.out_dtype = dtype_of(grads, "gradients"), dtype_of(outs, "outs")
    for name, tensors in moments.items():
        if name.endswith("_scales"):
            assert layout is not None
            check_scales(tensors, block_counts(*layout), name)
        else:
            exactly(tensors, torch.uint8 if layout else torch.float32, name)
            sizes(tensors, grads, name, known)
        setattr(args, name, arrays.pointers(tensors))
    if layout is not None:
        args.rows, args.cols, args.blocks = (arrays.int64(x) for x in layout)
    for name, values in (maps or {}).items():
        setattr(args, name, check_map(values, grads[0].device).data_ptr())
    if eps is not None and not row_eps:
        same(count, eps=eps)
        args.eps = arrays.float32(eps)
    if row_eps:
        same(count, row_eps=row_eps, row_scale=row_scale)
        widths = [g.shape[-1] if g.dim() else 1 for g in grads]
        for name, tensors in (("row_eps", row_eps), ("row_scale", row_scale)):
            rows = [math.prod(g.shape[:-1]) for g in grads]
            check_scales(tensors, rows, name)
            setattr(args, name, arrays.pointers(tensors))
        args.widths = arrays.int64(widths)
    if finite:
        same(count, finite=finite)
        if any(s.dtype != torch.bool or s.numel() != 1 for s in finite):
            raise TypeError("finite: one bool per tensor")
        args.finite = arrays.pointers(finite)
    args.numels = arrays.int64(known)
    flat(grads, "gradients")
    flat(outs, "outs")
    args.grads, args.outs = arrays.pointers(grads), arrays.pointers(outs)
    run(op, grads[0].device, args)


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
    """Update both moments; ``out <- m / (sqrt(v) + eps)``, or by rows of the last dimension."""
    moments = {"first": exp_avgs, "second": exp_avg_sqs}
    _update(
        "adamw_direction", grads, outs, beta1, beta2, finite, moments,
        eps=eps, row_eps=row_eps, row_scale=row_scale,
    )  # fmt: skip


def lion_direction_(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    outs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    finite: Sequence[Tensor],
) -> None:
    """``out <- sign(m + (1 - beta1)(g - m))``, then ``m <- m + (1 - beta2)(g - m)``."""
    _update("lion_direction", grads, outs, beta1, beta2, finite, {"first": exp_avgs})


def moment_(
    xs: Sequence[Tensor],
    moments: Sequence[Tensor],
    outs: Sequence[Tensor],
    decay: float,
    weight: float,
    finite: Sequence[Tensor],
) -> None:
    """``m <- decay m + weight x; out <- m``."""
    _update("moment", xs, outs, decay, weight, finite, {"first": moments})


def adamw_direction_8bit_(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    codes2: Sequence[Tensor],
    scales2: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    unsigned_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Sequence[Tensor],
    row_scale: Sequence[Tensor],
    finite: Sequence[Tensor],
) -> None:
    """`adamw_direction_` on 8-bit moments, one pass over each block."""
    moments = {"first_codes": codes, "first_scales": scales}
    moments |= {"second_codes": codes2, "second_scales": scales2}
    maps = {"signed_map": signed_map, "unsigned_map": unsigned_map}
    _update(
        "adamw_direction_8bit", grads, outs, beta1, beta2, finite, moments, maps=maps,
        layout=(rows, cols, blocks), eps=eps, row_eps=row_eps, row_scale=row_scale,
    )  # fmt: skip


def lion_direction_8bit_(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    beta1: float,
    beta2: float,
    finite: Sequence[Tensor],
) -> None:
    """`lion_direction_` on an 8-bit moment."""
    moments, maps = {"first_codes": codes, "first_scales": scales}, {"signed_map": signed_map}
    layout = rows, cols, blocks
    _update(
        "lion_direction_8bit", grads, outs, beta1, beta2, finite, moments, maps=maps, layout=layout
    )


def moment_8bit_(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    decay: float,
    weight: float,
    finite: Sequence[Tensor],
) -> None:
    """`moment_` on an 8-bit moment."""
    moments, maps = {"first_codes": codes, "first_scales": scales}, {"signed_map": signed_map}
    layout = rows, cols, blocks
    _update("moment_8bit", xs, outs, decay, weight, finite, moments, maps=maps, layout=layout)
