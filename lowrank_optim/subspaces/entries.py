"""Single entries of a gradient as its coordinates, their places recomputed from a key."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.subspaces.base import (
    BasisChange,
    Reduce,
    RefreshContext,
    State,
    Subspace,
    register,
)
from lowrank_optim.subspaces.coordinate import add_by_tiles_
from lowrank_optim.subspaces.target import Target
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_index

TILE = 1 << 18
"""Entries that are permuted among themselves: an index of them is all that ever exists."""
ROUNDS = 8
KEYS = 1 << 62
MASK = (1 << 64) - 1
MIX = 0x3F58476D1CE4E5B9


class Tile(NamedTuple):
    """A piece of whole rows, and its selected entries."""

    rows: slice
    slots: slice
    """Where its entries are in the vector of coordinates."""
    places: Tensor
    """Where they are in the flattened piece, int64."""


@register("randk")
@dataclass(frozen=True)
class RandK(Subspace):
    r"""k random entries of a matrix, ``floor(density m n)``; nothing but a key is kept of them.

    The matrix is cut into pieces of whole rows. Each selects its share of the k entries (the
    shares differ by rounding alone) as the image of 0, 1, 2, … under a pseudorandom permutation of
    the piece: an additive Feistel network, whose domain is the piece exactly.
    A matrix of up to 2^18 entries is one piece. The experts of a batch share their entries.

    Args:
        rank: number of entries k; an integer ``rank`` of a group means as many as the moments of a
            projection of the smaller side on that many directions.
        scale: factor of their update.

    Differs from the release: that keeps two int64 indices for each entry, 16 bytes beside the 8 of
    its moments.

    References:
        Zmushko et al. (2025), arXiv:2411.07837: ``coord_choice="randk"``.
    """

    needs_grad: ClassVar[bool] = False
    sees_all: ClassVar[bool] = False

    @property
    def whole(self) -> str | None:
        """A piece is permuted as a whole."""
        return (
            "its entries are drawn over the whole matrix. Take projector='columns', 'rsvd' or 'dct'"
        )

    @classmethod
    def side(cls, proj_type: str) -> str:
        """None: as stored."""
        return "left"

    def reproducible(self, count: int) -> bool:
        """A key is drawn, and no number is computed."""
        return True

    @classmethod
    def limit(cls, view: MatrixView) -> int:
        """All of them."""
        return view.m * view.n

    @classmethod
    def directions(cls, rank: int | float, view: MatrixView) -> int:
        """``floor(density m n)`` and at least one, or the size of a coordinate of that rank."""
        if isinstance(rank, float):
            return view.share(rank, view.m * view.n)
        return rank * max(view[2:4])

    def init(self, view: MatrixView, param: Tensor) -> State:
        """The key."""
        return {"key": torch.zeros((), dtype=torch.int64)}

    def check_state(self, state: Mapping[str, Tensor], view: MatrixView) -> None:
        """A key that a refresh could draw."""
        check_index(state, "key", KEYS)

    def refresh_(self, state: State, grad: Tensor, ctx: RefreshContext) -> dict[str, BasisChange]:
        """Draw a new key."""
        old = int(state["key"])
        new = int(torch.randint(1, KEYS, (), generator=ctx.generator))
        state["key"].fill_(new)
        m, n = ctx.view.m, ctx.view.n

        def carry(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            pairs = zip(self.tiles(m, n, old, x), self.tiles(m, n, new, x), strict=True)
            for before, after in pairs:
                piece = x.new_zeros(*x.shape[:-1], (after.rows.stop - after.rows.start) * n)
                piece[..., before.places] = x[..., before.slots]
                out[..., after.slots] = piece[..., after.places]
            return out

        return {"low": BasisChange(carry=carry)}

    def coord_shapes(self, view: MatrixView) -> dict[str, tuple[int, ...]]:
        """One coordinate, ``low (..., 1, k)``: a matrix of one row, so that experts stay apart."""
        return {"low": (*view.batch, 1, self.rank)}

    @property
    def by_column(self) -> bool:
        """They are entries by themselves, also where k happens to be n."""
        return False

    def coords(self, state: State, grad: Tensor, *, reduce: Reduce) -> dict[str, Tensor]:
        """The entries, in the order of the permutation."""
        low = grad.new_empty(*grad.shape[:-2], self.rank)
        m, n = grad.shape[-2:]
        for tile in self.tiles(m, n, int(state["key"]), grad):
            piece = grad[..., tile.rows, :].flatten(-2)
            low[..., tile.slots] = piece.index_select(-1, tile.places)
        return {"low": reduce(low.unsqueeze(-2))}

    def tiles(self, m: int, n: int, key: int, like: Tensor) -> Iterator[Tile]:
        """The pieces of an ``(m, n)`` matrix and their entries, on the device of ``like``."""
        rows = max(1, TILE // n)
        for start in range(0, m, rows):
            stop = min(start + rows, m)
            slots = slice(self.rank * start // m, self.rank * stop // m)
            count, size = slots.stop - slots.start, (stop - start) * n
            yield Tile(slice(start, stop), slots, permuted(count, size, key + start, like.device))

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """A pass over W and G in pieces: neither an index nor an update exists at full size."""
        low, scale = update["low"].squeeze(-2), self.scale
        m, n = into.param.shape[-2:]
        tiles = self.tiles(m, n, int(state["key"]), low)

        def put(rest: Tensor, extra: Tensor, start: int) -> Tensor:
            tile = next(tiles)
            flat, inside = rest.flatten(-2), extra.flatten(-2)
            own = low[..., tile.slots].to(rest.dtype) * scale + inside[..., tile.places]
            return flat.index_copy(-1, tile.places, own).view(rest.shape)

        add_by_tiles_(into, term, scale, put, max(1, TILE // n))


def permuted(count: int, size: int, key: int, device: torch.device) -> Tensor:
    """The images ``(count,)`` of 0, 1, … under a permutation of ``size`` places.

    A place is a pair of digits. Each round adds to one a keyed hash of the other, modulo its base:
    a bijection whatever the bases, so that no place need be drawn again.
    """
    bases = digits(size)
    x = torch.arange(count, device=device)
    pair = [x // bases[1], x % bases[1]]
    for number in range(ROUNDS if bases[0] >= ROUNDS else 4 * ROUNDS):
        turn = number % 2
        key = (key * 6364136223846793005 + 1442695040888963407) & MASK
        factor, offset = (key >> 24) | 1, (key >> 8) & 0xFFFF
        noise = (pair[1 - turn] + offset).mul_(factor)  # products wrap, as hashes do
        noise = noise.bitwise_xor_(noise >> 29).mul_(MIX).bitwise_right_shift_(33)
        pair[turn].add_(noise).remainder_(bases[turn])
    return pair[0].mul_(bases[1]).add_(pair[1])


@functools.cache
def digits(size: int) -> tuple[int, int]:
    """The two factors of ``size`` that differ least: a digit of few values would mix little."""
    small = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return small, size // small
