"""Where the random bits of stochastic rounding come from: a seed, and each entry's position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MASK = 0xFFFFFFFF


class Noise(NamedTuple):
    """A seed, and where the entries of a tensor lie in the whole that it is a piece of.

    Entry ``(i, j, ...)`` has position ``start + i strides[0] + j strides[1] + ...``, as torch
    addresses storage. A tile or a shard that keeps its positions is rounded as the whole would be,
    and two of them draw different noise.
    """

    seed: int | Tensor
    """A tensor ``()`` of int64 where the device alone knows it."""
    start: int
    strides: tuple[int, ...]
    """One a dimension."""

    @classmethod
    def over(cls, seed: int | Tensor, shape: Sequence[int], corner: Sequence[int] = ()) -> Noise:
        """Of a tensor of ``shape``, or of what of it begins at ``corner``.

        Args:
            seed: of all of it.
            shape: of the whole, whose positions count row by row.
            corner: index of the first entry (default: that of the whole).
        """
        strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        start = sum(i * stride for i, stride in zip(corner, strides, strict=bool(corner)))
        return cls(seed, start, strides)

    def narrow(self, dim: int, start: int) -> Noise:
        """Of the slice that begins at ``start`` of a dimension."""
        return self._replace(start=self.start + start * self.strides[dim])

    def select(self, index: int) -> Noise:
        """Of one entry of the first dimension."""
        return self.narrow(0, index)._replace(strides=self.strides[1:])

    @property
    def mT(self) -> Noise:
        """Of the transposed matrix, or matrices."""
        *outer, rows, columns = self.strides
        return self._replace(strides=(*outer, columns, rows))

    def layout(self, shape: Sequence[int]) -> list[Place]:
        """The positions of a tensor of ``shape`` that is read row by row: equal pieces of it."""
        levels: list[tuple[int, int]] = []  # size and stride, the innermost first
        for size, stride in zip(reversed(shape), reversed(self.strides), strict=True):
            if levels and stride == levels[-1][0] * levels[-1][1]:
                levels[-1] = size * levels[-1][0], levels[-1][1]
            elif size > 1:
                levels.append((size, stride))
        (width, column), (_, row) = (*levels[:2], (1, 0), (1, 0))[:2]
        starts = [self.start]
        for size, stride in reversed(levels[2:]):
            starts = [start + i * stride for start in starts for i in range(size)]
        return [Place(start & MASK, width, row & MASK, column & MASK) for start in starts]


class Place(NamedTuple):
    """Positions as the ops take them.

    Entry i is at ``offset + (i // width) row + (i % width) column``, modulo 2^32.
    """

    offset: int
    width: int
    row: int
    column: int


def check_places(
    count: int,
    offsets: Sequence[int],
    widths: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
) -> None:
    """Raise unless there is one of each for every tensor, and rows have entries.

    Raises:
        ValueError: there is not.
    """
    for name, own in zip(Place._fields, (offsets, widths, rows, columns), strict=True):
        if len(own) != count:
            raise ValueError(f"stochastic_round_: {len(own)} {name}s for {count} tensors")
    if any(width < 1 for width in widths):
        raise ValueError(f"stochastic_round_: a row has at least one entry, got widths {widths}")


def hash32(x: Tensor) -> Tensor:
    """A 32-bit hash (lowbias32) of integers below 2^32, in int64 arithmetic."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    x = x ^ (x >> 16)
    return x


GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64."""


def splitmix(seed: int, number: int) -> int:
    """64 bits of a seed and one more number."""
    seed = (seed + number + GOLDEN) % 2**64
    seed = ((seed ^ (seed >> 30)) * FIRST) % 2**64
    seed = ((seed ^ (seed >> 27)) * SECOND) % 2**64
    return seed ^ (seed >> 31)


def splitmix_(seeds: Tensor, number: int | Tensor) -> Tensor:
    """:func:`splitmix` of int64 on their device, whose products and sums wrap."""
    seeds = seeds + number + signed(GOLDEN)
    for shift, factor in ((30, FIRST), (27, SECOND)):
        seeds = (seeds ^ _shifted(seeds, shift)) * signed(factor)
    mixed: Tensor = seeds ^ _shifted(seeds, 31)
    return mixed


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    shifted: Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return shifted


def signed(x: int) -> int:
    """The int64 with the bits of ``x < 2^64``."""
    return x - 2**64 if x >= 2**63 else x
