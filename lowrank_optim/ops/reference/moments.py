"""Directions and moments: in floating point at once, in 8 bits a tile of whole blocks at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_optim.ops.reference.arguments import Tensors, or_none, wide
from lowrank_optim.ops.reference.storage import NEAREST, Codec
from lowrank_optim.ops.tiles import spans


def adamw(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    beta1: float,
    beta2: float,
    eps: float | Tensor,
    scale: Tensor | None,
) -> Tensor:
    """``scale m / (sqrt(v) + eps)`` of one tensor; both moments updated in place."""
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = v.sqrt().add_(eps)
    direction = torch.div(m, denominator, out=denominator)
    return direction if scale is None else direction.mul_(scale)


def _lion(g: Tensor, m: Tensor, beta1: float, beta2: float) -> Tensor:
    direction = m.lerp(g, 1 - beta1).sign_()
    m.lerp_(g, 1 - beta2)
    return direction


def _moment(x: Tensor, m: Tensor, decay: float, weight: float) -> Tensor:
    return m.mul_(decay).add_(x, alpha=weight)


def _guarded(
    update: Callable[..., Tensor], g: Tensor, moments: Tensors, finite: Tensor | None, out: Tensor
) -> None:
    """Run ``update(g, *moments)`` into ``out``; where not ``finite``, change nothing and give 0."""
    if finite is None:
        out.copy_(update(g, *moments))
        return
    before = [m.clone() for m in moments]
    direction = update(g, *moments)
    out.copy_(torch.where(finite, direction, 0.0))
    for m, old in zip(moments, before, strict=True):
        m.copy_(torch.where(finite, m, old))


def adamw_direction_(
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    outs: Tensors,
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Tensors,
    row_scale: Tensors,
    finite: Tensors,
) -> None:
    """``m / (sqrt(v) + eps)``, both moments updated in place."""
    count = len(grads)
    rows = zip(eps, or_none(row_eps, count), or_none(row_scale, count), strict=True)
    tensors = zip(grads, exp_avgs, exp_avg_sqs, outs, or_none(finite, count), strict=True)
    for (g, m, v, out, ok), (e, re, rs) in zip(tensors, rows, strict=True):
        update = _adamw_update(beta1, beta2, e, re, rs)
        _guarded(update, wide(g), [m, v], ok, out)


def _adamw_update(
    beta1: float, beta2: float, eps: float, row_eps: Tensor | None, row_scale: Tensor | None
) -> Callable[..., Tensor]:
    def update(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        # a batch of matrices has its rows in one vector too, and a number is one row
        rows = (*m.shape[:-1], 1) if m.dim() else ()
        epsilon = eps if row_eps is None else row_eps.reshape(rows)
        scale = None if row_scale is None else row_scale.reshape(rows)
        return adamw(g, m, v, beta1, beta2, epsilon, scale)

    return update


def lion_direction_(
    grads: Tensors, exp_avgs: Tensors, outs: Tensors, beta1: float, beta2: float, finite: Tensors
) -> None:
    """``sign(b1 m + (1 - b1) g)``, then the momentum follows with ``b2``."""
    for g, m, out, ok in zip(grads, exp_avgs, outs, or_none(finite, len(grads)), strict=True):
        _guarded(lambda g, m: _lion(g, m, beta1, beta2), wide(g), [m], ok, out)


def moment_(
    xs: Tensors, moments: Tensors, outs: Tensors, decay: float, weight: float, finite: Tensors
) -> None:
    """``m <- decay m + weight x``, returned in ``outs`` too."""
    for x, m, out, ok in zip(xs, moments, outs, or_none(finite, len(xs)), strict=True):
        _guarded(lambda x, m: _moment(x, m, decay, weight), wide(x), [m], ok, out)


Moment8 = tuple[Tensor, Tensor, Tensor]
"""Codes and scales of one moment, and its map."""


def _update8_(
    update: Callable[..., Tensor],
    g: Tensor,
    moments: Sequence[Moment8],
    out: Tensor,
    shape: tuple[int, int, int],
    finite: Tensor | None,
    codec: Codec,
    row: Callable[[slice], Callable[..., Tensor]] | None = None,
) -> None:
    """One pass over the blocks: decode, update, encode; no moment exists whole in float32."""
    rows, cols, block = shape
    flat, flat_out = g.reshape(-1), out.view(-1)
    for span, blocks in spans(rows, cols, block):
        dense = [
            codec.decode(c.view(-1)[span], s[blocks], table, cols, block) for c, s, table in moments
        ]
        update_piece = update if row is None else row(span)
        direction = update_piece(flat[span].float(), *dense)
        if finite is not None:
            direction = torch.where(finite, direction, 0.0)
        flat_out[span].copy_(direction)
        encoders = (codec.encode_, codec.encode_squares_)
        for x, (codes, scales, table), encode_ in zip(dense, moments, encoders, strict=False):
            piece, scale = codes.view(-1)[span], scales[blocks]
            if finite is None:
                encode_(x, piece, scale, table, cols, block)
                continue
            old_piece, old_scale = piece.clone(), scale.clone()
            encode_(x, piece, scale, table, cols, block)
            piece.copy_(torch.where(finite, piece, old_piece))
            scale.copy_(torch.where(finite, scale, old_scale))


def adamw_direction_8bit_(
    grads: Tensors,
    codes1: Tensors,
    scales1: Tensors,
    codes2: Tensors,
    scales2: Tensors,
    outs: Tensors,
    signed_map: Tensor,
    unsigned_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    row_eps: Tensors,
    row_scale: Tensors,
    finite: Tensors,
    codec: Codec = NEAREST,
) -> None:
    """:func:`adamw_direction_` on moments in 8 bits."""
    count = len(grads)
    layouts = zip(rows, cols, blocks, strict=True)
    moments = zip(codes1, scales1, codes2, scales2, strict=True)
    by_row = zip(eps, or_none(row_eps, count), or_none(row_scale, count), strict=True)
    tensors = zip(grads, outs, or_none(finite, count), strict=True)
    for (g, out, ok), (c1, s1, c2, s2), shape, (e, re, rs) in zip(
        tensors, moments, layouts, by_row, strict=True
    ):
        pair = [(c1, s1, signed_map), (c2, s2, unsigned_map)]
        plain = _adamw_update(beta1, beta2, e, None, None)
        at = None
        if re is not None and rs is not None:
            at = _adamw_rows(g, beta1, beta2, re, rs)
        _update8_(plain, g, pair, out, shape, ok, codec, at)


def _adamw_rows(
    g: Tensor, beta1: float, beta2: float, row_eps: Tensor, row_scale: Tensor
) -> Callable[[slice], Callable[..., Tensor]]:
    """The update of a piece of ``g`` whose elements take their eps and scale from their rows."""
    width = max(1, g.shape[-1])
    row_eps, row_scale = row_eps.reshape(-1), row_scale.reshape(-1)

    def at(span: slice) -> Callable[..., Tensor]:
        row = torch.arange(span.start, span.stop, device=g.device) // width
        return lambda g, m, v: adamw(g, m, v, beta1, beta2, row_eps[row], row_scale[row])

    return at


def lion_direction_8bit_(
    grads: Tensors,
    codes: Tensors,
    scales: Tensors,
    outs: Tensors,
    signed_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    beta1: float,
    beta2: float,
    finite: Tensors,
    codec: Codec = NEAREST,
) -> None:
    """:func:`lion_direction_` on a moment in 8 bits."""
    oks = or_none(finite, len(grads))
    layouts = zip(rows, cols, blocks, strict=True)
    for g, c, s, out, shape, ok in zip(grads, codes, scales, outs, layouts, oks, strict=True):
        moment = [(c, s, signed_map)]
        _update8_(lambda g, m: _lion(g, m, beta1, beta2), g, moment, out, shape, ok, codec)


def moment_8bit_(
    xs: Tensors,
    codes: Tensors,
    scales: Tensors,
    outs: Tensors,
    signed_map: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    decay: float,
    weight: float,
    finite: Tensors,
    codec: Codec = NEAREST,
) -> None:
    """:func:`moment_` on a moment in 8 bits."""
    oks = or_none(finite, len(xs))
    layouts = zip(rows, cols, blocks, strict=True)
    for x, c, s, out, shape, ok in zip(xs, codes, scales, outs, layouts, oks, strict=True):
        _update8_(
            lambda x, m: _moment(x, m, decay, weight),
            x,
            [(c, s, signed_map)],
            out,
            shape,
            ok,
            codec,
        )
