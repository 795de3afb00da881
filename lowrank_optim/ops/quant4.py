"""Block-wise 4-bit quantisation, rounded without bias."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_optim.ops.composite import put_all_
from lowrank_optim.ops.noise import Noise
from lowrank_optim.ops.quant import values_of
from lowrank_optim.ops.stacked import empty_like_all, stacked
from lowrank_optim.ops.tiles import tile_elements, tiles

BLOCK = 128
"""Elements that share a scale; none of another row does."""
DECADES = 3
"""Of the signed map, which has as many values below 0 as above it, 0 and 1."""
LEVELS = 16
LEAST = LEVELS * torch.finfo(torch.float32).tiny
"""A scale of what is not 0: its smallest square is a normal number, on devices that flush too."""
MOST = torch.finfo(torch.float32).max
UNIT = 128.0
"""bfloat16 has the whole numbers, and nothing between them, from here to twice as far."""


@functools.cache
def _values(signed: bool) -> list[float]:
    return values_of(True, DECADES) if signed else [(n + 1) / LEVELS for n in range(LEVELS)]


@functools.cache
def four_bit_map(signed: bool, device: torch.device) -> Tensor:
    r"""The 16 values of a code, ascending, on ``device``.

    Signed: the dynamic exponent map with a sign, at most two bits of exponent and the rest of
    fraction, :math:`0, \pm 0.0055, \pm 0.0325, \dots, \pm 0.8875, 1`. Unsigned: the linear map
    without zero, :math:`1/16, 2/16, \dots, 1`.

    References:
        Li et al. (2023), arXiv:2309.01507.
    """
    return torch.tensor(_values(signed), dtype=torch.float32, device=device)


@functools.cache
def _pairs(signed: bool, device: torch.device) -> Tensor:
    """The two values of each byte ``(256, 2)``, the first in the low half."""
    values = _values(signed)
    pairs = [[values[byte % LEVELS], values[byte // LEVELS]] for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)


@functools.cache
def zero_code(signed: bool) -> int:
    """The code of 0; of squares, which have none, the least: a scale of 0 makes it 0."""
    return _values(True).index(0.0) if signed else 0


def zero_byte(signed: bool) -> int:
    """Two codes of 0."""
    return zero_code(signed) * (1 + LEVELS)


def packed_width(cols: int) -> int:
    """Bytes of a row."""
    return -(-cols // 2)


def scale_count(cols: int) -> int:
    """Blocks of a row: the last may be short."""
    return -(-cols // BLOCK)


def packed(codes: Tensor, width: int | None = None, fill: int = 0) -> Tensor:
    """Codes of 4 bits ``(..., k)`` in uint8 as ``(..., width)`` bytes (default: ceil(k / 2))."""
    cols = codes.shape[-1]
    rest = 2 * (packed_width(cols) if width is None else width) - cols
    if rest:
        codes = pad(codes, (0, rest), value=fill)
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(codes: Tensor, cols: int) -> Tensor:
    """The ``cols`` codes of each row of bytes; the inverse of :func:`packed`."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :cols]


def passing(rows: int, cols: int, like: Tensor) -> int:
    """Elements of float32 that :func:`quantize4_` needs at once, on the device of ``like``."""
    rows, blocks = min(rows, max(1, tile_elements(like) // max(1, cols))), scale_count(cols)
    whole = blocks * BLOCK if cols % BLOCK else 0  # filled up
    return rows * (3 * cols + whole + 4 * blocks)


class Packed(NamedTuple):
    """A moment in 4 bits: ``(..., ceil(k / 2))`` bytes and ``(..., ceil(k / 128))`` scales."""

    codes: Tensor
    scales: Tensor

    def matrix(self) -> Packed:
        """Its rows in one dimension."""
        return Packed(*(x.view(x.numel() // max(1, x.shape[-1]), x.shape[-1]) for x in self))

    def tile(self, rows: slice) -> Packed:
        """Some of the rows of a matrix."""
        return Packed(self.codes[rows], self.scales[rows])


def _tiles(like: Tensor, count: int) -> Iterator[tuple[slice, slice]]:
    """Which of ``count`` matrices at once, and which rows of them: temporaries are of a tile."""
    most, (rows, cols) = tile_elements(like), like.shape
    many = max(1, most // max(1, rows * cols))
    height = max(1, rows if many > 1 else most // max(1, cols))
    for start in range(0, count, many):
        for own in tiles(rows, height):
            yield slice(start, start + many), own


def quantize4_(
    xs: Sequence[Tensor],
    into: Sequence[Packed],
    signed: bool,
    noises: Sequence[Noise],
    finite: Sequence[Tensor] = (),
) -> None:
    """Write alike tensors ``(..., k)`` in 4 bits.

    Args:
        xs: contiguous float32.
        into: where they are kept; codes of 0 fill up rows of more bytes.
        signed: which map; without a sign they are squares, and none is negative.
        noises: with the place of an entry in the whole their seeds decide which of the two nearest
            codes it takes.
        finite: 0-d bools on the device; where False what is kept does not change.
    """
    if not xs[0].numel():
        return
    found = [_matrices(*own) for own in zip(xs, into, noises, strict=True)]
    finite = [ok for own, ok in zip(found, finite, strict=False) for _ in own]
    views, kept, seeds = zip(*(piece for own in found for piece in own), strict=True)
    for at, rows in _tiles(views[0], len(views)):
        own = [x.tile(rows) for x in kept[at]]
        new = _encoded(
            stacked([x[rows] for x in views[at]]),
            signed,
            [noise.narrow(0, rows.start) for noise in seeds[at]],
            kept[0].codes.shape[-1],
        )
        for out, x in zip(zip(*own, strict=True), new, strict=True):
            if finite:
                x = torch.where(stacked(finite[at]).view(-1, 1, 1), x, stacked(out))
            torch._foreach_copy_(list(out), list(x.unbind(0)))


def _matrices(x: Tensor, into: Packed, noise: Noise) -> list[tuple[Tensor, Packed, Noise]]:
    """``(..., k)`` as ``(rows, k)``, in as many pieces as have rows at equal distances."""
    if x.dim() < 2:
        return [(x.unsqueeze(0), into.matrix(), noise._replace(strides=(0, *noise.strides)))]
    *outer, row, column = noise.strides
    apart = row
    for stride, size in zip(reversed(outer), reversed(x.shape[1:-1]), strict=True):
        apart *= size
        if stride != apart:
            pieces = ((x[i], Packed(*(y[i] for y in into)), noise.select(i)) for i in range(len(x)))
            return [own for piece in pieces for own in _matrices(*piece)]
    return [(x.reshape(-1, x.shape[-1]), into.matrix(), noise._replace(strides=(row, column)))]


def _encoded(x: Tensor, signed: bool, noises: Sequence[Noise], packed_to: int) -> Packed:
    """``(B, rows, k)`` in 4 bits, rows of so many bytes."""
    cols, width = x.shape[-1], scale_count(x.shape[-1])
    blocks = pad(x, (0, -cols % BLOCK)) if cols % BLOCK else x
    blocks = blocks.view(*x.shape[:-1], width, BLOCK)
    least, most = blocks.aminmax(dim=-1)
    scales = torch.where(-least > most, least, most) if signed else most
    bounded = scales.abs().clamp_(LEAST, MOST).copysign_(scales)
    scales = torch.where(scales == 0, 0.0, bounded)
    units = blocks / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    units = units.flatten(-2)[..., :cols].contiguous()
    level = _signed_level(units) if signed else units.mul_(LEVELS).sub_(1)
    # between two whole numbers of bfloat16, to one of which a kernel takes it by place and seed
    level = level.clamp_(0, LEVELS - 1).add_(UNIT)
    rounded = torch.empty_like(level, dtype=torch.bfloat16)
    put_all_(list(rounded.unbind(0)), list(level.unbind(0)), noises)
    codes = rounded.sub_(UNIT).to(torch.uint8)
    return Packed(packed(codes, packed_to, zero_code(signed)), scales)


def _signed_level(units: Tensor) -> Tensor:
    """Where values of -1 to 1 lie among the codes: a whole number at the value of each."""
    table = four_bit_map(True, units.device)
    below = torch.bucketize(units, table, out_int32=True, right=True).sub_(1).clamp_(0, LEVELS - 2)
    return units.sub_(_at(table, below)).mul_(_at(1 / table.diff(), below)).add_(below)


def _at(table: Tensor, places: Tensor) -> Tensor:
    """``table[places]`` of int32: to index, torch would copy all places in int64 first."""
    return table.index_select(0, places.reshape(-1)).view(*places.shape, *table.shape[1:])


def dequantize4(moments: Sequence[Packed], signed: bool, cols: int) -> list[Tensor]:
    """The first ``cols`` values of each row of alike moments ``(..., k)``, in float32."""
    codes, kept = [x.codes for x in moments], [x.matrix() for x in moments]
    outs = empty_like_all(codes, (*codes[0].shape[:-1], cols), torch.float32)
    if not outs[0].numel():
        return outs
    every = stacked(outs).view(len(outs), -1, cols)
    for at, rows in _tiles(every[0], len(outs)):
        parts = zip(*(x.tile(rows) for x in kept[at]), strict=True)
        every[at, rows].copy_(_decoded(Packed(*map(stacked, parts)), signed, cols))
    return outs


def _decoded(x: Packed, signed: bool, cols: int) -> Tensor:
    """``(B, rows, cols)``: the value of each code times the scale of its block."""
    width = x.scales.shape[-1] * (BLOCK // 2)
    codes = x.codes if x.codes.shape[-1] == width else pad(x.codes, (0, width - x.codes.shape[-1]))
    values = _at(_pairs(signed, codes.device), codes.int())
    blocks = values.view(*x.scales.shape, BLOCK)
    return blocks.mul_(x.scales.unsqueeze(-1)).flatten(-2)[..., :cols]
