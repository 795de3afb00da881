"""Directions of the rules with 8-bit moments: a block is read, updated and written in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lowrank_optim.ops.triton.elements import (
    block_layout,
    block_scale,
    requantize,
    row_of,
    sign,
)
from lowrank_optim.ops.triton.launch import (
    as_float,
    float_bits,
    launch,
    locate,
    number,
    packed,
    pointer,
    select,
)
from lowrank_optim.ops.triton.quantize import Layouts, block_groups, block_programs, form


@triton.jit(do_not_specialize=["rows", "cols", "block", "eps_bits", "width"])
def adamw8_kernel(
    table, tensors, grad, codes, scales, codes2, scales2, out, row_eps, row_scale, finite,
    rows, cols, block, eps_bits, width, signed_map, unsigned_map, signed_edges, unsigned_edges,
    weight1, beta2, weight2,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    ROW_EPS: tl.constexpr, ROW_SCALE: tl.constexpr, SOUND: tl.constexpr,
    FORM: tl.constexpr, FORM2: tl.constexpr,
    COUNT: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """AdamW's direction; the moments exist in float32 for ``COUNT`` blocks at a time."""
    t, part = locate(table, tensors, MANY, DEPTH)
    lane = tl.arange(0, LANES)
    cols = number(table, tensors, t, 11, cols, MANY)
    block = number(table, tensors, t, 12, block, MANY)
    rows = number(table, tensors, t, 10, rows, MANY)
    b, start, live, mask = block_layout(part, rows, cols, block, lane, COUNT, LANES, WHOLE)
    at = start[:, None] + lane[None, :]
    codes = pointer(table, tensors, t, 2, codes, MANY, ALIGNED)
    scales = pointer(table, tensors, t, 3, scales, MANY, False)
    codes2 = pointer(table, tensors, t, 4, codes2, MANY, ALIGNED)
    scales2 = pointer(table, tensors, t, 5, scales2, MANY, False)
    out = pointer(table, tensors, t, 6, out, MANY, ALIGNED)

    g = tl.load(pointer(table, tensors, t, 1, grad, MANY, ALIGNED) + at, mask, 0.0).to(tl.float32)
    m = tl.load(signed_map + tl.load(codes + at, mask, 0).to(tl.int32))
    m = m * tl.load(scales + b, live, 0.0)[:, None]
    v = tl.load(unsigned_map + tl.load(codes2 + at, mask, 0).to(tl.int32))
    v = v * tl.load(scales2 + b, live, 0.0)[:, None]
    m = tl.where(mask, m + weight1 * (g - m), 0.0)
    v = tl.where(mask, beta2 * v + weight2 * g * g, 0.0)

    eps = as_float(number(table, tensors, t, 13, eps_bits, MANY))
    if ROW_EPS or ROW_SCALE:
        row = row_of(start[:, None], lane[None, :], number(table, tensors, t, 14, width, MANY))
    if ROW_EPS:
        eps = tl.load(pointer(table, tensors, t, 7, row_eps, MANY, False) + row, mask, 1.0)
    direction = tl.div_rn(m, tl.sqrt_rn(v) + eps)
    if ROW_SCALE:
        factor = pointer(table, tensors, t, 8, row_scale, MANY, False)
        direction = tl.load(factor + row, mask, 0.0) * direction
    keep = mask
    keep_scale = live
    if SOUND:
        fine = tl.load(pointer(table, tensors, t, 9, finite, MANY, False)) != 0
        direction = tl.where(fine, direction, 0.0)
        keep = mask & (lane < tl.where(fine, LANES, 0))[None, :]
        keep_scale = live & (b < tl.where(fine, b + 1, 0))
    tl.store(out + at, direction.to(out.dtype.element_ty), mask)
    scale = block_scale(m)
    tl.store(codes + at, requantize(m, scale, signed_edges, FORM), keep)
    tl.store(scales + b, scale, keep_scale)
    scale2 = block_scale(v)
    code2 = requantize(v, scale2, unsigned_edges, FORM2)
    # a positive square keeps a positive code: as 0 it would let the next step divide by eps alone
    lost = (code2 == 0) & (v > 0) & (scale2 < float("inf"))[:, None]
    tl.store(codes2 + at, tl.where(lost, 1, code2).to(tl.uint8), keep)
    tl.store(scales2 + b, scale2, keep_scale)


@triton.jit(do_not_specialize=["rows", "cols", "block"])
def moment8_kernel(
    table, tensors, x, codes, scales, out, finite, rows, cols, block,
    signed_map, signed_edges, decay, weight, weight2,
    MANY: tl.constexpr, DEPTH: tl.constexpr, ALIGNED: tl.constexpr,
    LION: tl.constexpr, SOUND: tl.constexpr,
    FORM: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One 8-bit moment; see ``moment_kernel``."""
    t, part = locate(table, tensors, MANY, DEPTH)
    lane = tl.arange(0, LANES)
    rows = number(table, tensors, t, 6, rows, MANY)
    cols = number(table, tensors, t, 7, cols, MANY)
    block = number(table, tensors, t, 8, block, MANY)
    b, start, live, mask = block_layout(part, rows, cols, block, lane, COUNT, LANES, WHOLE)
    at = start[:, None] + lane[None, :]
    codes = pointer(table, tensors, t, 2, codes, MANY, ALIGNED)
    scales = pointer(table, tensors, t, 3, scales, MANY, False)
    out = pointer(table, tensors, t, 4, out, MANY, ALIGNED)

    g = tl.load(pointer(table, tensors, t, 1, x, MANY, ALIGNED) + at, mask, 0.0).to(tl.float32)
    m = tl.load(signed_map + tl.load(codes + at, mask, 0).to(tl.int32))
    m = m * tl.load(scales + b, live, 0.0)[:, None]
    if LION:
        direction = sign(m + weight * (g - m))
        m = m + weight2 * (g - m)
    else:
        m = decay * m + weight * g
        direction = m
    m = tl.where(mask, m, 0.0)
    keep = mask
    keep_scale = live
    if SOUND:
        fine = tl.load(pointer(table, tensors, t, 5, finite, MANY, False)) != 0
        direction = tl.where(fine, direction, 0.0)
        keep = mask & (lane < tl.where(fine, LANES, 0))[None, :]
        keep_scale = live & (b < tl.where(fine, b + 1, 0))
    tl.store(out + at, direction.to(out.dtype.element_ty), mask)
    scale = block_scale(m)
    tl.store(codes + at, requantize(m, scale, signed_edges, FORM), keep)
    tl.store(scales + b, scale, keep_scale)


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
    """Update both 8-bit moments in place and write AdamW's direction, before bias correction."""
    packed(("codes", "scales", "codes2", "scales2", "outs"), (codes, scales, codes2, scales2, outs))
    lists = [
        [g.contiguous() for g in grads], codes, scales, codes2, scales2, outs,
        row_eps, row_scale, finite,
    ]  # fmt: skip
    kind, signed_edges = form(signed_map)
    kind2, unsigned_edges = form(unsigned_map)
    for at, tiles in block_groups(lists, (rows, cols, blocks)):
        layout = select((rows, cols, blocks), at)
        widths = [outs[i].shape[-1] if outs[i].dim() else 1 for i in at]
        launch(
            adamw8_kernel, select(lists, at), [*layout, [float_bits(eps[i]) for i in at], widths],
            block_programs(*layout), signed_map, unsigned_map, signed_edges, unsigned_edges,
            1 - beta1, beta2, 1 - beta2, FORM=kind, FORM2=kind2, **tiles,
            ROW_EPS=len(row_eps) > 0, ROW_SCALE=len(row_scale) > 0, SOUND=len(finite) > 0,
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
    """Write Lion's direction and update the 8-bit moment in place."""
    weights = (0.0, 1 - beta1, 1 - beta2)
    _moment8(grads, codes, scales, outs, signed_map, (rows, cols, blocks), weights, True, finite)


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
    """``m = decay m + weight x`` on an 8-bit moment; ``outs`` gets it before it is quantised."""
    weights = (decay, weight, 0.0)
    _moment8(xs, codes, scales, outs, signed_map, (rows, cols, blocks), weights, False, finite)


def _moment8(
    xs: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    outs: Sequence[Tensor],
    signed_map: Tensor,
    layouts: Layouts,
    weights: tuple[float, float, float],
    lion: bool,
    finite: Sequence[Tensor],
) -> None:
    packed(("codes", "scales", "outs"), (codes, scales, outs))
    lists = [[x.contiguous() for x in xs], codes, scales, outs, finite]
    kind, edges = form(signed_map)
    for at, tiles in block_groups(lists, layouts):
        layout = select(layouts, at)
        launch(
            moment8_kernel, select(lists, at), layout, block_programs(*layout),
            signed_map, edges, *weights, LION=lion, SOUND=len(finite) > 0, FORM=kind, **tiles,
        )  # fmt: skip
