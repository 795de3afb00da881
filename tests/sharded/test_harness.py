"""The harness itself: what raises, hangs or dies in a rank is told, and jobs after it run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]


def total(world: World, start: int) -> float:
    x = torch.tensor(float(start + world.rank))
    dist.all_reduce(x)
    return float(x)


def spread(world: World) -> float:
    """On a mesh that torch keeps, in the results of operators too."""
    mesh = init_device_mesh("cpu", (world.size,))
    x: Any = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).mul(2.0)
    assert x.device_mesh.get_group() is mesh.get_group()
    return float(x.full_tensor().sum())


def one_raises(world: World) -> None:
    """The others wait in a collective for a rank that never comes."""
    if world.rank == 1:
        raise ValueError("on purpose")
    dist.all_reduce(torch.zeros(1))


def one_sleeps(world: World) -> None:
    if world.rank == 0:
        time.sleep(3600)


def one_more_collective(world: World) -> None:
    """A number of collectives that depends on the rank."""
    if world.rank == 0:
        dist.all_reduce(torch.zeros(1))


def one_dies(world: World) -> None:
    if world.rank == 1:
        os._exit(3)


def numbers(world: World) -> Any:
    return torch.rand(2), os.environ["RANK"], os.environ["WORLD_SIZE"], torch.get_num_threads()


@pytest.fixture(scope="module")
def brief() -> Iterator[Ranks]:
    """One that waits no longer than these jobs need."""
    world = Ranks(2, grace=1.0)
    yield world
    world.close()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_jobs_run_on_all_ranks(size: int, ranks: Worlds) -> None:
    for start in (0, 5):
        values = ranks(size).run("total", total, start=start).checked()
        assert values == [size * start + size * (size - 1) / 2] * size


def test_ranks_share_no_numbers(ranks: Worlds) -> None:
    first, second = ranks(2).run("numbers", numbers).checked()
    assert first[1:] == ("0", "2", 1) and second[1:] == ("1", "2", 1)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (one_raises, r"one_raises failed on 2 ranks(?s:.)*rank 1: (?s:.)*ValueError: on purpose"),
        pytest.param(
            one_sleeps,
            r"one_sleeps failed on 1 ranks(?s:.)*rank 0: hung(?s:.)*in one_sleeps",
            marks=pytest.mark.slow,
        ),
        pytest.param(  # as one that dies, which the others wait for
            one_more_collective,
            r"one_more_collective failed on 1 ranks(?s:.)*rank 0: hung",
            marks=pytest.mark.slow,
        ),
        (one_dies, r"one_dies failed on 1 ranks(?s:.)*rank 1: hung, or died, in 'one_dies'"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_failure_has_its_name_and_the_next_job_runs(
    job: Callable[..., Any], told: str, brief: Ranks
) -> None:
    brief.run("spread", spread).checked()
    began = time.monotonic()
    outcome = brief.run(job.__name__, job)
    assert outcome.failed and time.monotonic() - began < 15
    with pytest.raises(AssertionError, match=told):
        outcome.checked()
    assert brief.run("total", total, start=1).checked() == [3.0, 3.0]
    assert brief.run("spread", spread).checked() == [8.0, 8.0]
