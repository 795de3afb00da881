"""Every op in plain torch, on every device: what the accelerated versions are tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops.cosine import (  # noqa: F401  (ops of this backend)
    check_name,
    cosine_adamw_,
    cosine_lift_add_,
    cosine_project_,
    cosine_scores,
)
from lowrank_optim.ops.rows import check_rows

TILE_ELEMENTS = 1 << 18
"""Elements of a tile buffer, so that a temporary never grows with the parameter."""

TINY = torch.finfo(torch.float32).tiny
"""Scales below this are multiplied by 2^64 before their reciprocal is taken."""

Tensors = Sequence[Tensor]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _or_none(xs: Tensors, count: int) -> Sequence[Tensor | None]:
    return xs if len(xs) else [None] * count


# ---------------------------------------------------------------- directions


def _adamw(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    beta1: float,
    beta2: float,
    eps: float | Tensor,
    scale: Tensor | None,
) -> Tensor:
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
    kept = [m.clone() for m in moments]
    direction = update(g, *moments)
    out.copy_(torch.where(finite, direction, 0.0))
    for m, old in zip(moments, kept, strict=True):
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
    rows = zip(eps, _or_none(row_eps, count), _or_none(row_scale, count), strict=True)
    tensors = zip(grads, exp_avgs, exp_avg_sqs, outs, _or_none(finite, count), strict=True)
    for (g, m, v, out, ok), (e, re, rs) in zip(tensors, rows, strict=True):
        update = _adamw_update(beta1, beta2, e, re, rs)
        _guarded(update, _wide(g), [m, v], ok, out)


def _adamw_update(
    beta1: float, beta2: float, eps: float, row_eps: Tensor | None, row_scale: Tensor | None
) -> Callable[..., Tensor]:
    def update(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        rows = (*m.shape[:-1], 1)  # a batch of matrices has its rows in one vector too
        own_eps = eps if row_eps is None else row_eps.reshape(rows)
        scale = None if row_scale is None else row_scale.reshape(rows)
        return _adamw(g, m, v, beta1, beta2, own_eps, scale)

    return update


def lion_direction_(
    grads: Tensors, exp_avgs: Tensors, outs: Tensors, beta1: float, beta2: float, finite: Tensors
) -> None:
    """``sign(b1 m + (1 - b1) g)``, then the momentum follows with ``b2``."""
    for g, m, out, ok in zip(grads, exp_avgs, outs, _or_none(finite, len(grads)), strict=True):
        _guarded(lambda g, m: _lion(g, m, beta1, beta2), _wide(g), [m], ok, out)


def moment_(
    xs: Tensors, moments: Tensors, outs: Tensors, decay: float, weight: float, finite: Tensors
) -> None:
    """``m <- decay m + weight x``, returned in ``outs`` too."""
    for x, m, out, ok in zip(xs, moments, outs, _or_none(finite, len(xs)), strict=True):
        _guarded(lambda x, m: _moment(x, m, decay, weight), _wide(x), [m], ok, out)


# ---------------------------------------------------------------- 8 bits


def spans(rows: int, cols: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of whole blocks of about a tile: elements of the flat tensor, and their scales."""
    each = -(-cols // block)
    if cols >= TILE_ELEMENTS:
        width = TILE_ELEMENTS // block * block
        for row in range(rows):
            for i in range(0, cols, width):
                j = min(i + width, cols)
                start = row * each + i // block
                yield (
                    slice(row * cols + i, row * cols + j),
                    slice(start, start - (-(j - i) // block)),
                )
        return
    height = max(1, TILE_ELEMENTS // max(1, cols))
    for row in range(0, rows, height):
        end = min(row + height, rows)
        yield slice(row * cols, end * cols), slice(row * each, end * each)


def _blocked(x: Tensor, cols: int, block: int) -> Tensor:
    """A flat piece as ``(blocks, block)``, tails padded with zeros."""
    width = min(cols, x.numel())
    x = x.reshape(-1, width)
    pad = -width % block
    return torch.nn.functional.pad(x, (0, pad)).view(-1, block) if pad else x.reshape(-1, block)


def _unblocked(x: Tensor, numel: int, cols: int, block: int) -> Tensor:
    width = min(cols, numel)
    return x.reshape(-1, width + -width % block)[:, :width].reshape(-1)


def _decode(codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int) -> Tensor:
    values = table[_blocked(codes, cols, block).int()] * scales.unsqueeze(-1)
    return _unblocked(values, codes.numel(), cols, block)


def _encode_(
    x: Tensor, codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int
) -> None:
    blocks = _blocked(x, cols, block)
    absmax = blocks.abs().amax(-1)
    scales.copy_(absmax)
    # The reciprocal of a denormal may overflow, and 0 * inf is NaN: those blocks are lifted first.
    lift = torch.where(absmax < TINY, 2.0**64, 1.0)
    absmax = absmax * lift
    unit = (blocks * lift.unsqueeze(-1)) * torch.where(absmax > 0, 1 / absmax, 0.0).unsqueeze(-1)
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(unit, middles)
    codes.copy_(_unblocked(nearest, x.numel(), cols, block))


def keep_positive_(x: Tensor, codes: Tensor, scales: Tensor, cols: int, block: int) -> None:
    """Give positive squares the least positive code, where the nearest is that of 0.

    As 0 a second moment would let the next step divide by eps alone.
    """
    finite = scales.isfinite().unsqueeze(-1).expand(-1, block)
    lost = (codes == 0) & (x > 0) & _unblocked(finite, x.numel(), cols, block)
    codes.add_(lost.to(codes.dtype))


class Codec(NamedTuple):
    """What reads and writes the blocks of a flat piece."""

    decode: Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
    encode_: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]
    encode_squares_: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]


def _encode_squares_(
    x: Tensor, codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int
) -> None:
    _encode_(x, codes, scales, table, cols, block)
    keep_positive_(x, codes, scales, cols, block)


NEAREST = Codec(_decode, _encode_, _encode_squares_)
"""Every value takes the code nearest to it, a positive square a positive one."""


def quantize_blockwise_(
    xs: Tensors,
    codes: Tensors,
    scales: Tensors,
    table: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    codec: Codec = NEAREST,
) -> None:
    """Scale of each block: its largest magnitude; codes: the nearest value of the map."""
    for x, c, s, r, n, b in zip(xs, codes, scales, rows, cols, blocks, strict=True):
        flat, out = x.reshape(-1), c.view(-1)
        for span, own in spans(r, n, b):
            codec.encode_(flat[span].float(), out[span], s[own], table, n, b)


def dequantize_blockwise_(
    codes: Tensors,
    scales: Tensors,
    outs: Tensors,
    table: Tensor,
    rows: Sequence[int],
    cols: Sequence[int],
    blocks: Sequence[int],
    codec: Codec = NEAREST,
) -> None:
    """``map[code] * scale``."""
    for c, s, o, r, n, b in zip(codes, scales, outs, rows, cols, blocks, strict=True):
        flat, out = c.reshape(-1), o.view(-1)
        for span, own in spans(r, n, b):
            out[span].copy_(codec.decode(flat[span], s[own], table, n, b))


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
    for span, own in spans(rows, cols, block):
        dense = [
            codec.decode(c.view(-1)[span], s[own], table, cols, block) for c, s, table in moments
        ]
        now = update if row is None else row(span)
        direction = now(flat[span].float(), *dense)
        if finite is not None:
            direction = torch.where(finite, direction, 0.0)
        flat_out[span].copy_(direction)
        encoders = (codec.encode_, codec.encode_squares_)
        for x, (codes, scales, table), encode_ in zip(dense, moments, encoders, strict=False):
            piece, scale = codes.view(-1)[span], scales[own]
            if finite is None:
                encode_(x, piece, scale, table, cols, block)
                continue
            kept = piece.clone(), scale.clone()
            encode_(x, piece, scale, table, cols, block)
            piece.copy_(torch.where(finite, piece, kept[0]))
            scale.copy_(torch.where(finite, scale, kept[1]))


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
    by_row = zip(eps, _or_none(row_eps, count), _or_none(row_scale, count), strict=True)
    tensors = zip(grads, outs, _or_none(finite, count), strict=True)
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
        return lambda g, m, v: _adamw(g, m, v, beta1, beta2, row_eps[row], row_scale[row])

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
    oks = _or_none(finite, len(grads))
    layouts = zip(rows, cols, blocks, strict=True)
    for g, c, s, out, shape, ok in zip(grads, codes, scales, outs, layouts, oks, strict=True):
        kept = [(c, s, signed_map)]
        _update8_(lambda g, m: _lion(g, m, beta1, beta2), g, kept, out, shape, ok, codec)


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
    oks = _or_none(finite, len(xs))
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


# ---------------------------------------------------------------- rounding


def _lowbias32(x: Tensor) -> Tensor:
    """A 32-bit integer hash, in int64 arithmetic."""
    mask = 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & mask
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & mask
    return x ^ (x >> 16)


def stochastic_round_(xs: Tensors, outs: Tensors, seeds: Sequence[int]) -> None:
    """float32 to bfloat16, up or down with the probability that makes it unbiased.

    The 16 bits that bfloat16 drops are added to 16 random ones and the sum is truncated. They come
    from a hash of (position, seed), so that every backend draws the same. Numbers that are not
    finite pass through.
    """
    for x, out, seed in zip(xs, outs, seeds, strict=True):
        flat, flat_out = x.reshape(-1), out.view(-1)
        for i in range(0, x.numel(), TILE_ELEMENTS):
            piece = flat[i : i + TILE_ELEMENTS].contiguous()
            index = torch.arange(i, i + piece.numel(), device=x.device) & 0xFFFFFFFF
            noise = _lowbias32(index ^ (seed & 0xFFFFFFFF)) & 0xFFFF
            bits = ((piece.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + noise) & 0xFFFF0000
            rounded = bits.to(torch.int32).view(torch.float32)
            flat_out[i : i + TILE_ELEMENTS] = torch.where(piece.isfinite(), rounded, piece)


# ---------------------------------------------------------------- fused applies


def column_norms(xs: Tensors) -> list[Tensor]:
    """Norm of each column, ``(..., 1, n)`` in float32 (or wider), a tile of rows at a time."""
    found = []
    for x in xs:
        total = x.new_zeros(*x.shape[:-2], 1, x.shape[-1], dtype=_wide(x[..., :0, :0]).dtype)
        for tile in _row_tiles(x):
            total += _wide(tile).square().sum(-2, keepdim=True)
        found.append(total.sqrt_())
    return found


def _row_tiles(x: Tensor) -> tuple[Tensor, ...]:
    rows = max(1, TILE_ELEMENTS * x.shape[-2] // max(1, x.numel()))
    return torch.split(x, rows, dim=-2)


def _tiles_with_(
    w: Tensor,
    decay: float,
    update: Callable[..., Tensor],
    finite: Tensor | None,
    *others: Tensor,
) -> None:
    """``W <- decay W - update(tiles of others)`` by tiles of rows, each rounded once into W."""
    for tile, *rest in zip(_row_tiles(w), *_split_like(w, others), strict=True):
        new = _wide(tile).mul(decay).sub_(update(*map(_wide, rest))).to(w.dtype)
        tile.copy_(new if finite is None else torch.where(finite, new, tile))


def _split_like(w: Tensor, others: Tensors) -> list[tuple[Tensor, ...]]:
    rows = max(1, TILE_ELEMENTS * w.shape[-2] // max(1, w.numel()))
    return [torch.split(x, rows, dim=-2) for x in others]


def lift_add_scaled_(
    params: Tensors,
    grads: Tensors,
    bases: Tensors,
    updates: Tensors,
    lows: Tensors,
    columns: Tensors,
    decay: float,
    lr: float,
    scale: float,
    finite: Tensors = (),
) -> None:
    """``W <- decay W - lr (P (a N - a R o c) + G o c)``: one GEMM and one pass."""
    matrices = zip(params, grads, bases, updates, lows, columns, strict=True)
    for (w, g, p, n, r, c), ok in zip(matrices, _or_none(finite, len(params)), strict=True):
        small = scale * (_wide(n) - _wide(r) * c)
        _tiles_with_(w, decay, lambda g, p, s=small, c=c: lr * (p @ s + g * c), ok, g, p)


def lift_add_sign_(
    params: Tensors,
    grads: Tensors,
    bases: Tensors,
    updates: Tensors,
    lows: Tensors,
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    finite: Tensors = (),
) -> None:
    """``W <- decay W - lr (a P N + gain sign(G - P R))``: two products on the same tiles of P."""
    matrices = zip(params, grads, bases, updates, lows, strict=True)
    for (w, g, p, n, r), ok in zip(matrices, _or_none(finite, len(params)), strict=True):
        n, r = _wide(n), _wide(r)

        def update(g: Tensor, p: Tensor, n: Tensor = n, r: Tensor = r) -> Tensor:
            return lr * (scale * (p @ n) + gain * (g - p @ r).sign_())

        _tiles_with_(w, decay, update, ok, g, p)


FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": torch.sign,
    "sgd": lambda g: g,
    "none": torch.zeros_like,
}
"""What a free rule does with the gradient outside the subspace."""


def coordinate_add_(
    params: Tensors,
    grads: Tensors,
    indices: Tensors,
    updates: Tensors,
    decay: float,
    lr: float,
    scale: float,
    gain: float,
    free: str,
    finite: Tensors = (),
) -> None:
    """Rows in ``index``: ``W <- decay W - lr a N``; the others: ``W <- decay W - lr gain f(G)``."""
    check_name("free", free, [*FREE])
    for w, index in zip(params, indices, strict=True):
        check_rows("coordinate_add_", index, w.shape[-2])
    matrices = zip(params, grads, indices, updates, strict=True)
    for (w, g, index, n), ok in zip(matrices, _or_none(finite, len(params)), strict=True):
        at = index.long().unsqueeze(-1).expand(n.shape)
        old = w.gather(-2, at)
        rows = _wide(old).mul(decay).sub_(_wide(n), alpha=lr * scale).to(w.dtype)
        _tiles_with_(w, decay, lambda g: lr * gain * FREE[free](g), ok, g)
        w.scatter_(-2, at, rows if ok is None else torch.where(ok, rows, old))


def coordinate_adamw_(
    params: Tensors,
    grads: Tensors,
    indices: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    beta1: float,
    beta2: float,
    eps: Sequence[float],
    steps: Sequence[float],
    free_steps: Sequence[float],
    decay: float,
    free: str,
) -> None:
    """Rows in ``index``: AdamW on their moments; the others: ``W <- decay W - free_step f(G)``."""
    check_name("free", free, [*FREE])
    for w, index in zip(params, indices, strict=True):
        check_rows("coordinate_adamw_", index, w.shape[-2])
    matrices = zip(params, grads, indices, exp_avgs, exp_avg_sqs, strict=True)
    factors = zip(eps, steps, free_steps, strict=True)
    for (w, g, index, m, v), (e, step, free_step) in zip(matrices, factors, strict=True):
        at = index.long().unsqueeze(-1).expand(m.shape)
        rows = _wide(w.gather(-2, at)).mul(decay)
        rows.sub_(_adamw(_wide(g.gather(-2, at)), m, v, beta1, beta2, e, None), alpha=step)
        _tiles_with_(w, decay, lambda g, s=free_step: s * FREE[free](g), None, g)
        w.scatter_(-2, at, rows.to(w.dtype))


def top_rows_(scores: Tensors, indices: Tensors, sources: Tensors) -> None:
    """The indices of the largest scores in place of ``indices``, and where each stood."""
    for score, index, source in zip(scores, indices, sources, strict=True):
        # sorted stably: among equals the lowest index, on every device
        best = torch.sort(score, descending=True, stable=True).indices[: index.shape[0]]
        new = best.sort().values.to(torch.int32)
        if index.shape[0]:
            at = torch.searchsorted(index, new).clamp_(max=index.shape[0] - 1)
            source.copy_(torch.where(index[at] == new, at, -1))
        index.copy_(new)
