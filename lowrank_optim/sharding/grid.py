"""Which rank has which block of a matrix, and which of its columns it steps."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Interval = tuple[int, int]
"""From, and up to."""


def length(x: Interval) -> int:
    """How many indices are in it."""
    return x[1] - x[0]


def common(a: Interval, b: Interval) -> Interval:
    """What is in both; empty ones have no place."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else (0, 0)


def chunk(size: int, pieces: int, at: int) -> Interval:
    """Piece ``at`` of ``torch.chunk``, and so of a Shard; the last ones may be empty."""
    most = -(-size // pieces)
    return min(at * most, size), min((at + 1) * most, size)


class Cut(NamedTuple):
    """How some dimensions of a mesh split one dimension of a tensor."""

    sizes: tuple[int, ...]
    """Of the mesh dimensions, as they follow each other in the mesh."""
    order: tuple[int, ...]
    """Which of them splits first, which then: under FSDP2 with tensor parallel the last does."""

    @property
    def factors(self) -> tuple[int, ...]:
        """Split factor of each: in how many pieces later dimensions have split what it splits.

        ``_StridedShard`` has it; that of a plain ``Shard`` is 1.
        """
        place = {dim: i for i, dim in enumerate(self.order)}
        dims = range(len(self.sizes))
        return tuple(
            math.prod(self.sizes[j] for j in dims if j > i and place[j] < place[i]) for i in dims
        )

    def interval(self, size: int, at: Sequence[int], unit: int = 1) -> Interval:
        """What the rank at coordinates ``at`` has of ``size`` indices, cut in units of ``unit``."""
        start, stop = 0, -(-size // unit)
        for dim in self.order:
            a, b = chunk(stop - start, self.sizes[dim], at[dim])
            start, stop = start + a, start + b
        start, stop = min(start * unit, size), min(stop * unit, size)
        return (start, stop) if start < stop else (0, 0)

    def is_read_alike(self, size: int) -> bool:
        """Whether DTensor, which goes by split factors, takes ``size`` apart in the same way."""
        return self.order == tuple(range(len(self.sizes))) or _read_alike(self, size)


def cut_of(sizes: Sequence[int], factors: Sequence[int]) -> Cut | None:
    """The cut that has these split factors; None if no order of the dimensions has."""
    for order in itertools.permutations(range(len(sizes))):
        found = Cut(tuple(sizes), order)
        if found.factors == tuple(factors):
            return found
    return None


@functools.lru_cache(maxsize=1024)
def _read_alike(cut: Cut, size: int) -> bool:
    for at in itertools.product(*map(range, cut.sizes)):
        own = list(_indices(cut, size, at))
        start, stop = cut.interval(size, at)
        if own != list(range(start, stop)):
            return False
    return True


def _indices(cut: Cut, size: int, at: Sequence[int]) -> Sequence[int]:
    """What DTensor says that a rank has: of each piece of a dimension before it, a piece."""
    own: Sequence[int] = range(size)
    for pieces, factor, i in zip(cut.sizes, cut.factors, at, strict=True):
        found: list[int] = []
        for j in range(factor):
            a, b = chunk(len(own), factor, j)
            c, d = chunk(b - a, pieces, i)
            found += own[a + c : a + d]
        own = found
    return own


class Block(NamedTuple):
    """Rows and columns of a matrix that one rank has."""

    rows: Interval
    columns: Interval


@dataclass(frozen=True)
class Grid:
    """What each rank of a group stores of ``(m, n)`` matrices, and which columns it steps."""

    m: int
    n: int
    stored: tuple[Block, ...]
    stepped: tuple[Interval, ...]

    @property
    def by_columns(self) -> bool:
        """Whether ranks store whole columns."""
        return all(length(own.rows) in (0, self.m) for own in self.stored)

    @property
    def moves(self) -> bool:
        """Whether some rank steps what another stores."""
        return not self.by_columns or any(
            own.columns != steps for own, steps in zip(self.stored, self.stepped, strict=True)
        )

    def sent(self, source: int, to: int) -> Block | None:
        """What a rank stores and another steps; None where no message takes it.

        Of whole columns a rank keeps its own: then the edges alone travel.
        """
        if source == to and self.by_columns:
            return None
        return self.shared(source, to)

    def shared(self, source: int, to: int) -> Block:
        """What is stored by one rank and stepped by the other."""
        own = self.stored[source]
        return Block(own.rows, common(own.columns, self.stepped[to]))

    def stays(self, rank: int) -> Block | None:
        """What a rank steps where it is, with no message."""
        return self.shared(rank, rank) if self.by_columns else None


def coordinates(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Of all ranks of a mesh, in its order."""
    return itertools.product(*map(range, sizes))
