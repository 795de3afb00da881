"""Single entries of a gradient as its coordinates, their places recomputed from a key."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.ops.devices import sent
from lowrank_optim.ops.tiles import fillings, tile_elements
from lowrank_optim.subspaces.base import State, Subspace, register
from lowrank_optim.subspaces.coordinate import add_by_tiles_
from lowrank_optim.subspaces.refresh import BasisChange, RefreshContext
from lowrank_optim.subspaces.target import Target, guarded
from lowrank_optim.subspaces.terms import Term
from lowrank_optim.tensors.matrix import MatrixView
from lowrank_optim.tensors.values import check_index

TILE = 1 << 18
"""Entries that are permuted among themselves: an index of them is all that ever exists."""
BYTES = 8
"""Of an index: of those of a tile a device holds as many bytes as it has elements in one."""
ROUNDS = 8
KEYS = 1 << 62
MASK = (1 << 64) - 1
MIX = 0x3F58476D1CE4E5B9


class Tile(NamedTuple):
    """Consecutive pieces of whole rows, and their selected entries."""

    rows: slice
    slots: slice
    """Where its entries are in the vector of coordinates."""
    places: Tensor
    """Where they are in the flattened rows, int64."""


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

    def coords(self, state: State, grad: Tensor) -> dict[str, Tensor]:
        """The entries, in the order of the permutation."""
        return {"low": self._taken(grad, self._tiles([state], grad)[0])}

    def coords_of(
        self, states: Sequence[State], grads: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """As of each; places of several are computed at once."""
        return [
            {"low": self._taken(grads[n], tiles)}
            for at in fillings(len(grads), BYTES * grads[0].numel(), grads[0])
            for n, tiles in zip(at, self._tiles([states[n] for n in at], grads[0]), strict=True)
        ]

    def _taken(self, grad: Tensor, tiles: Iterable[Tile]) -> Tensor:
        """Entries ``(..., 1, k)``."""
        low = grad.new_empty(*grad.shape[:-2], self.rank)
        for tile in tiles:
            rows = grad[..., tile.rows, :].flatten(-2)
            torch.index_select(rows, -1, tile.places, out=low[..., tile.slots])
        return low.unsqueeze(-2)

    def _tiles(self, states: Sequence[State], like: Tensor) -> list[Iterable[Tile]]:
        """Those of alike matrices; of one alone they are made when they are asked for."""
        m, n = like.shape[-2:]
        keys = [int(state["key"]) for state in states]
        if len(keys) == 1:
            return [self.tiles(m, n, keys[0], like)]
        return [*zip(*self.tiles_of(m, n, keys, like), strict=True)]

    def tiles(self, m: int, n: int, key: int, like: Tensor) -> Iterator[Tile]:
        """The pieces of an ``(m, n)`` matrix and their entries, on the device of ``like``."""
        return (tile for (tile,) in self.tiles_of(m, n, [key], like))

    def tiles_of(self, m: int, n: int, keys: Sequence[int], like: Tensor) -> Iterator[list[Tile]]:
        """:meth:`tiles` of alike matrices, by their keys."""
        for rows, starts in self._pieces(m, n, like):
            bounds = [self.rank * start // m for start in (*starts, rows.stop)]
            counts = [b - a for a, b in pairwise(bounds)]
            size = (rows.stop - rows.start) // len(starts) * n
            seeds = [key + start for key in keys for start in starts]
            places = permuted(max(counts), size, seeds, like.device)
            if len(starts) > 1:
                places = places.view(len(keys), len(starts), -1)
                places += torch.arange(0, len(starts) * size, size, device=like.device).unsqueeze(
                    -1
                )
                parts = [x[:, :count] for x, count in zip(places.unbind(1), counts, strict=True)]
                places = torch.cat(parts, -1)
            yield [Tile(rows, slice(bounds[0], bounds[-1]), own) for own in places.unbind(0)]

    def _pieces(self, m: int, n: int, like: Tensor) -> Iterator[tuple[slice, Sequence[int]]]:
        """Rows of each tile, and where its pieces begin, which are alike.

        They are as many as a device has room for.
        """
        each = max(1, min(m, TILE // n))
        whole = m // each * each
        rows = each * max(1, tile_elements(like) // (BYTES * each * n))
        for start in range(0, whole, rows):
            stop = min(start + rows, whole)
            yield slice(start, stop), range(start, stop, each)
        if whole < m:
            yield slice(whole, m), [whole]

    def push_(
        self, into: Target, state: State, update: dict[str, Tensor], term: Term | None
    ) -> None:
        """A pass over W and G in pieces: neither an index nor an update exists at full size."""
        self._push_(into, update, term, self._tiles([state], into.param)[0])

    def push_all_(
        self,
        intos: Sequence[Target],
        states: Sequence[State],
        updates: Sequence[dict[str, Tensor]],
        terms: Sequence[Term | None],
    ) -> Iterator[int]:
        """As of each; places of several are computed at once."""
        intos = guarded(intos)
        for at in fillings(len(intos), BYTES * intos[0].param.numel(), intos[0].param):
            all_tiles = self._tiles([states[n] for n in at], intos[0].param)
            for n, tiles in zip(at, all_tiles, strict=True):
                self._push_(intos[n], updates[n], terms[n], tiles)
                yield n

    def _push_(
        self, into: Target, update: dict[str, Tensor], term: Term | None, own: Iterable[Tile]
    ) -> None:
        low, scale, tiles = update["low"].squeeze(-2), self.scale, iter(own)

        def put(rest: Tensor, extra: Tensor, start: int) -> Tensor:
            tile = next(tiles)
            flat, inside = rest.flatten(-2), extra.flatten(-2)
            own = low[..., tile.slots].to(rest.dtype) * scale + inside[..., tile.places]
            return flat.index_copy(-1, tile.places, own).view(rest.shape)

        m, n = into.param.shape[-2:]
        add_by_tiles_(into, term, scale, put, [rows for rows, _ in self._pieces(m, n, into.param)])


def permuted(count: int, size: int, keys: Sequence[int], device: torch.device) -> Tensor:
    """The images ``(b, count)`` of 0, 1, … under b permutations of ``size`` places.

    A place is a pair of digits. Each round adds to one a keyed hash of the other, modulo its base:
    a bijection whatever the bases, so that no place need be drawn again.
    """
    bases = digits(size)
    x = torch.arange(count, device=device).repeat(len(keys), 1)
    pair = [x // bases[1], x % bases[1]]
    for number, (offset, factor) in enumerate(_schedule(bases, keys, device)):
        turn = number % 2
        noise = (pair[1 - turn] + offset).mul_(factor)  # products wrap, as hashes do
        noise = noise.bitwise_xor_(noise >> 29).mul_(MIX).bitwise_right_shift_(33)
        pair[turn].add_(noise).remainder_(bases[turn])
    return pair[0].mul_(bases[1]).add_(pair[1])


def _schedule(
    bases: tuple[int, int], keys: Sequence[int], device: torch.device
) -> Iterable[Sequence[Tensor]]:
    """What each round adds to a digit and multiplies it by: ``(b, 1)`` both."""
    rounds = []
    for _ in range(ROUNDS if bases[0] >= ROUNDS else 4 * ROUNDS):
        keys = [(key * 6364136223846793005 + 1442695040888963407) & MASK for key in keys]
        rounds.append([[(key >> 8) & 0xFFFF for key in keys], [(key >> 24) | 1 for key in keys]])
    table = sent(torch.tensor(rounds, dtype=torch.int64), device).unsqueeze(-1)
    return [own.unbind(0) for own in table.unbind(0)]


@functools.cache
def digits(size: int) -> tuple[int, int]:
    """The two factors of ``size`` that differ least: a digit of few values would mix little."""
    small = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return small, size // small
