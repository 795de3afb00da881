"""What a step sends, and that no rank ever holds what it should not: counted, not estimated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.sharded.meter import Meter, allowed, assert_collectives, assert_small
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]

# ------------------------------------------------------------------ the meter itself


def sharded(world: World, shape: tuple[int, ...] = (64, 48), place: int = 0) -> DTensor:
    mesh = init_device_mesh("cpu", (world.size,))
    x = torch.arange(float(shape[0] * shape[1]), dtype=torch.float64).reshape(shape).sin()
    return distribute_tensor(x, mesh, [Shard(place)], src_data_rank=None)


WHOLE: dict[str, Callable[[DTensor], Any]] = {
    "gathers": lambda x: x.full_tensor(),
    "decomposes": lambda x: torch.linalg.svd(x, full_matrices=False),
    "replicates": lambda x: x.redistribute(placements=[Replicate()]),
    "adds": lambda x: x + torch.ones_like(x).redistribute(placements=[Replicate()]),
    "allocates": lambda x: x.to_local().new_zeros(x.shape),
    "has a state of the global shape": lambda x: torch.zeros(x.shape, dtype=x.dtype),
}
"""What puts a whole matrix on every rank."""


def watched(world: World, how: str) -> Any:
    x = sharded(world)
    limit = x.to_local().numel() * 8
    with Meter() as before:
        x.to_local() * 2
        x.to_local().add_(1)
        x * 2
    assert_small(before, limit)
    assert_collectives(before, {})
    with Meter() as after:
        WHOLE[how](x)
    with pytest.raises(AssertionError, match="storages above"):
        assert_small(after, limit)
    if after.collectives:
        with pytest.raises(AssertionError, match="collectives"):
            assert_collectives(after, {})
    return after.counts, after.largest.bytes


@pytest.mark.parametrize("how", WHOLE)
def test_a_whole_matrix_is_caught(how: str, ranks: Worlds) -> None:
    silent = how in ("allocates", "has a state of the global shape")
    for counts, largest in ranks(2).run(how, watched, how=how).checked():
        assert largest >= 64 * 48 * 8
        assert bool(counts) != silent


def each_kind(world: World) -> Any:
    """Every collective once, as a list of what was seen."""
    x = torch.ones(12, dtype=torch.float64)
    out = torch.empty(12 * world.size, dtype=torch.float64)
    group = dist.group.WORLD
    lists = [torch.empty_like(x) for _ in range(world.size)]
    pieces = list(torch.ones(12, dtype=torch.float64).chunk(world.size))
    with Meter() as meter:
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        dist.all_gather(lists, x)
        dist.all_gather_into_tensor(out, x)
        dist.gather(x, lists if world.rank == 0 else None, 0)
        dist.scatter(x, lists if world.rank == 0 else None, 0)
        dist.all_to_all_single(torch.empty_like(x), x)
        dist.all_to_all([torch.empty_like(p) for p in pieces], pieces)
        dist.reduce(x, 0)
        dist.barrier()
        functional.all_reduce(x, "sum", group).sum()
        functional.all_gather_tensor(x, 0, group).sum()
        functional.all_to_all_single(x, None, None, group).sum()
        functional.broadcast(x, 0, group).sum()
        functional.reduce_scatter_tensor(x, "sum", 0, group).sum()
        if world.rank == 0:
            dist.send(x, 1)
        elif world.rank == 1:
            dist.recv(x, 0)
    return [(c.kind, c.bytes) for c in meter.collectives]


def test_every_collective_is_seen_once(ranks: Worlds) -> None:
    kinds = "all_reduce broadcast all_gather all_gather gather scatter all_to_all all_to_all reduce"
    kinds += " all_reduce all_gather all_to_all broadcast reduce_scatter"
    for rank, seen in enumerate(ranks(2).run("each kind", each_kind).checked()):
        expected = [(kind, 96) for kind in kinds.split()]
        expected += [("send" if rank == 0 else "recv", 96)]
        got = [x for x in seen if x[0] != "scatter"]
        assert got == [x for x in expected if x[0] != "scatter"]
        assert [x[0] for x in seen] == [x[0] for x in expected]
