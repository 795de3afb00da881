"""Who has what: against torch's own account, and against matrices that are moved."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Shard, _utils
from torch.distributed.tensor.placement_types import _StridedShard

from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.grid import Block, Cut, Grid, coordinates, cut_of
from tests.sharded.meter import Meter, assert_collectives
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
READS = hasattr(_utils, "_compute_local_shape_and_global_offset")
"""torch 2.6 has not: it says of uneven pieces of pieces what is not so, of its own weights too."""
MESHES = ((4,), (2, 2), (2, 3), (4, 2), (3, 2, 2))
SIZES = (1, 2, 3, 5, 6, 7, 8, 9, 12, 17)


def every_cut() -> list[Cut]:
    return [
        Cut(sizes, order) for sizes in MESHES for order in itertools.permutations(range(len(sizes)))
    ]


def by_torch(cut: Cut, size: int, at: Sequence[int]) -> tuple[int, int]:
    """What DTensor says that a rank has: how much, and from where."""
    places = [
        Shard(0) if factor == 1 else _StridedShard(0, split_factor=factor) for factor in cut.factors
    ]
    own = _utils._compute_local_shape_and_global_offset((size,), cut.sizes, list(at), places)
    return own[0][0], own[1][0]


@pytest.mark.parametrize("cut", every_cut(), ids=str)
def test_a_cut_is_chunks_of_chunks(cut: Cut) -> None:
    """In the order that it says, in units of any size, and DTensor agrees where it is said to."""
    assert cut_of(cut.sizes, cut.factors) == cut
    for size, unit in itertools.product(SIZES, (1, 2, 4)):
        units = torch.arange(size).split(unit)
        for at in coordinates(cut.sizes):
            own: Sequence[Tensor] = units
            for dim in cut.order:
                places = torch.arange(len(own)).chunk(cut.sizes[dim])
                mine = places[at[dim]] if at[dim] < len(places) else torch.arange(0)
                own = [own[i] for i in mine]
            start, stop = cut.interval(size, at, unit)
            expected = torch.cat(list(own)).tolist() if own else []
            assert list(range(start, stop)) == expected, (size, unit, at)
            if READS and unit == 1 and cut.is_read_alike(size):
                length, offset = by_torch(cut, size, at)
                assert length == stop - start and (not length or offset == start), (size, at)


@pytest.mark.skipif(not READS, reason="of torch 2.6 nothing uneven agrees")
def test_where_dtensor_does_not_agree() -> None:
    """Nine rows over tensor parallel of two, then four: DTensor gives the last to another rank."""
    cut = Cut((4, 2), (1, 0))
    assert cut.interval(9, (3, 1)) == (8, 9) and by_torch(cut, 9, (3, 1))[0] == 0
    ragged = [size for size in range(1, 40) if not cut.is_read_alike(size)]
    wrong = []
    for size in range(1, 40):
        for at in coordinates(cut.sizes):
            start, stop = cut.interval(size, at)
            length, offset = by_torch(cut, size, at)
            if length != stop - start or (length and offset != start):
                wrong.append(size)
                break
    assert 9 in wrong and set(wrong) <= set(ragged), (wrong, ragged)


def grids(seed: int) -> Grid:
    """Any way to store a matrix on four ranks, and to step it."""
    draw = random.Random(seed)
    m, n, unit = draw.randint(2, 9), draw.randint(2, 23), draw.choice([1, 1, 3, 5])
    ats = list(coordinates((2, 2)))
    kind = draw.choice(["rows", "columns", "blocks", "blocks the other way"])
    square = [Cut((2, 2), (0, 1)), Cut((2, 2), (1, 0))]
    one = Cut((2,), (0,))
    order, steps = draw.choice(square), draw.choice(square)
    stored = []
    for at in ats:
        rows, columns = (0, m), (0, n)
        if kind == "rows":
            rows = order.interval(m, at)
        elif kind == "columns":
            columns = order.interval(n, at)
        else:
            down, across = at if kind == "blocks" else at[::-1]
            rows, columns = one.interval(m, (down,)), one.interval(n, (across,))
        stored.append(Block(rows, columns))
    return Grid(m, n, tuple(stored), tuple(steps.interval(n, at, unit) for at in ats))


def there_and_back(world: World, seeds: range) -> list[str]:
    """What went wrong with matrices of which every entry tells its place."""
    group, wrong = dist.group.WORLD, []
    assert group is not None
    for seed in seeds:
        grid = grids(seed)
        own, (a, b) = grid.stored[world.rank], grid.stepped[world.rank]
        dtype = [torch.float64, torch.float32, torch.bfloat16][seed % 3]
        batch = (2,) if seed % 5 == 0 else ()
        whole = torch.arange(float(grid.m * grid.n)).view(grid.m, grid.n).expand(*batch, -1, -1)
        both = [(whole + k).to(dtype) for k in range(2)]
        stored = [x[..., slice(*own.rows), slice(*own.columns)] for x in both]
        stepped = [x[..., a:b] for x in both]
        with Meter() as meter:
            columns = collectives.to_columns(stored, grid, world.rank, group)
            blocks = collectives.to_blocks(columns, grid, world.rank, group)
        for got, want in zip([*columns, *blocks], [*stepped, *stored], strict=True):
            if got.shape != want.shape or not torch.equal(got, want):
                wrong.append(f"{seed}: {got.shape} {want.shape} of {grid}")
        assert_collectives(meter, {"all_to_all": (2, told(grid, world.rank, dtype, batch))})
    return wrong


def told(grid: Grid, rank: int, dtype: torch.dtype, batch: tuple[int, ...]) -> int:
    """Bytes that a rank puts into both messages, of two matrices, counted entry by entry."""
    whole = all(own.rows in ((0, grid.m), (0, 0)) for own in grid.stored)
    total = 0
    for other in range(4):
        for source, to in ((rank, other), (other, rank)):
            if source == to and whole:
                continue
            own, (a, b) = grid.stored[source], grid.stepped[to]
            count = len(range(*own.rows)) * len(set(range(*own.columns)) & set(range(a, b)))
            size = count * dtype.itemsize * (2 if batch else 1)
            total += 2 * (-(-size // collectives.ALIGN) * collectives.ALIGN)
    return total


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 240), marks=pytest.mark.slow)], ids=str
)
def test_any_blocks_become_columns_and_come_back(seeds: range, ranks: Worlds) -> None:
    kept = [not grid.moves for grid in map(grids, seeds)]
    edges = [grid.moves and grid.by_columns for grid in map(grids, seeds)]
    assert sum(kept) > 3 and sum(edges) > 10, "all kinds are among them"
    for wrong in ranks(4).run("there and back", there_and_back, seeds=seeds).checked():
        assert not wrong, wrong[:3]


def test_what_is_stepped_as_stored_does_not_move() -> None:
    for sizes, order in [((4,), (0,)), ((2, 2), (0, 1)), ((2, 2), (1, 0))]:
        cut = Cut(sizes, order)
        for n in SIZES:
            steps = tuple(cut.interval(n, at) for at in coordinates(sizes))
            grid = Grid(3, n, tuple(Block((0, 3), own) for own in steps), steps)
            assert not grid.moves
            rows: Any = tuple(Block(cut.interval(3, at), (0, n)) for at in coordinates(sizes))
            assert Grid(3, n, rows, steps).moves
