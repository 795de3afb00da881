"""How numbers are kept: codes of 8 bits in blocks, and bfloat16 rounded without bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops.noise import check_places, hash32
from lowrank_optim.ops.reference.arguments import Tensors
from lowrank_optim.ops.tiles import TILE_ELEMENTS, spans

TINY = torch.finfo(torch.float32).tiny


def blocked(x: Tensor, cols: int, block: int) -> Tensor:
    """A flat piece as ``(blocks, block)``, tails padded with zeros."""
    width = min(cols, x.numel())
    x = x.reshape(-1, width)
    pad = -width % block
    return torch.nn.functional.pad(x, (0, pad)).view(-1, block) if pad else x.reshape(-1, block)


def unblocked(x: Tensor, numel: int, cols: int, block: int) -> Tensor:
    """Blocks as the flat piece of ``numel`` elements that they were, without padding."""
    width = min(cols, numel)
    return x.reshape(-1, width + -width % block)[:, :width].reshape(-1)


def _decode(codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int) -> Tensor:
    values = table[blocked(codes, cols, block).int()] * scales.unsqueeze(-1)
    return unblocked(values, codes.numel(), cols, block)


def _encode_(
    x: Tensor, codes: Tensor, scales: Tensor, table: Tensor, cols: int, block: int
) -> None:
    blocks = blocked(x, cols, block)
    absmax = blocks.abs().amax(-1)
    scales.copy_(absmax)
    # The reciprocal of a denormal may overflow, and 0 * inf is NaN: those blocks are lifted first.
    lift = torch.where(absmax < TINY, 2.0**64, 1.0)
    absmax = absmax * lift
    unit = (blocks * lift.unsqueeze(-1)) * torch.where(absmax > 0, 1 / absmax, 0.0).unsqueeze(-1)
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize(unit, middles)
    codes.copy_(unblocked(nearest, x.numel(), cols, block))


def keep_positive_(x: Tensor, codes: Tensor, scales: Tensor, cols: int, block: int) -> None:
    """Give positive squares the least positive code, where the nearest is that of 0.

    As 0 a second moment would let the next step divide by eps alone.
    """
    finite = scales.isfinite().unsqueeze(-1).expand(-1, block)
    lost = (codes == 0) & (x > 0) & unblocked(finite, x.numel(), cols, block)
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
        for span, piece in spans(r, n, b):
            codec.encode_(flat[span].float(), out[span], s[piece], table, n, b)


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
        for span, piece in spans(r, n, b):
            out[span].copy_(codec.decode(flat[span], s[piece], table, n, b))


def _positions(
    i: int,
    count: int,
    offset: int,
    width: int,
    row: int,
    column: int,
    *,
    device: torch.device,
) -> Tensor:
    """Positions of ``count`` entries from the i-th on; products wrap, as the sum does."""
    index = torch.arange(i, i + count, device=device)
    position = torch.div(index, width, rounding_mode="floor") * row + index % width * column
    return (position + offset) & 0xFFFFFFFF


def stochastic_round_(
    xs: Tensors,
    outs: Tensors,
    seeds: Sequence[int | Tensor],
    offsets: Sequence[int],
    widths: Sequence[int],
    row_strides: Sequence[int],
    column_strides: Sequence[int],
) -> None:
    """float32 to bfloat16, up or down with the probability that makes it unbiased.

    The 16 bits that bfloat16 drops are added to 16 random ones and the sum is truncated. They come
    from a hash of (position, seed), so that every backend draws the same. Entry i is at position
    ``offset + (i // width) row_stride + (i % width) column_stride`` of the whole, modulo 2^32.
    Numbers that are not finite pass through.
    """
    places = offsets, widths, row_strides, column_strides
    check_places(len(xs), *places)
    for x, out, seed, *place in zip(xs, outs, seeds, *places, strict=True):
        flat, flat_out = x.reshape(-1), out.view(-1)
        for i in range(0, x.numel(), TILE_ELEMENTS):
            piece = flat[i : i + TILE_ELEMENTS].contiguous()
            position = _positions(i, piece.numel(), *place, device=x.device)
            noise = hash32(position ^ (seed & 0xFFFFFFFF)) & 0xFFFF
            bits = ((piece.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + noise) & 0xFFFF0000
            rounded = bits.to(torch.int32).view(torch.float32)
            flat_out[i : i + TILE_ELEMENTS] = torch.where(piece.isfinite(), rounded, piece)
