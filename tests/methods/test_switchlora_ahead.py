"""Candidates fetched ahead: what is fetched is what is used, and nothing else changes.

A CUDA device does this from pinned memory; here the host plays both parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_optim import SwitchLoRAAdamW, SwitchLoRAAdamW8bit, lowrank_groups
from lowrank_optim.nn import convert
from lowrank_optim.subspaces import ahead
from tests import runs
from tests.pairwise import in_turns
from tests.sharded.test_state_bytes import pretended

Taken = list[bool]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """As if pools were out of the device's reach; for every window, whether it was there."""
    out: Taken = []
    take = ahead.Ahead.take

    def noted(self: ahead.Ahead, *args: Any) -> Tensor | None:
        rows = take(self, *args)
        out.append(rows is not None)
        return rows

    monkeypatch.setattr(ahead, "apart", lambda pool, factor: True)
    monkeypatch.setattr(ahead.Ahead, "take", noted)
    return out


def of_weights(**options: Any) -> tuple[nn.Module, SwitchLoRAAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 25), nn.Linear(25, 18))
    return model, SwitchLoRAAdamW(lowrank_groups(model, **options), lr=0.05)


def of_modules(**options: Any) -> tuple[nn.Module, SwitchLoRAAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 25), nn.Linear(25, 18))
    return model, SwitchLoRAAdamW(convert(model, "switchlora", **options), lr=0.05)


Made = Callable[..., tuple[nn.Module, SwitchLoRAAdamW]]


def steps(model: nn.Module, optimizer: SwitchLoRAAdamW, which: range) -> None:
    for step in which:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(6, 18, generator=generator)).square().mean().backward()
        optimizer.step()


def assert_same(a: tuple[nn.Module, SwitchLoRAAdamW], b: tuple[nn.Module, SwitchLoRAAdamW]) -> None:
    runs.assert_same(a[0].parameters(), b[0].parameters())
    runs.assert_same_state(runs.entries(a[1]), runs.entries(b[1]))


SWITCHING: list[dict[str, Any]] = [
    {"rank": 6, "interval": 4, "freeze_steps": 1},
    {"rank": 16, "interval": 4, "freeze_steps": 1},  # two are free: what has just left is next
    {"rank": 5, "interval": 12, "freeze_steps": 2, "total_steps": 400, "descent": "Z"},
    {"rank": 6, "interval": 4, "freeze_steps": 1, "restart_every": 7},
    {"rank": 6, "interval": 4, "freeze_steps": 1, "state_dtype": "8bit"},
]


@pytest.mark.parametrize(
    ("options", "make"),
    in_turns(SWITCHING, (of_weights, of_modules)),
)
def test_every_window_was_fetched_and_the_run_is_the_same(
    make: Made, options: dict[str, Any], taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is known, so but for the very first switch all windows are there in time."""
    fetched = make(**options)
    steps(*fetched, range(20))
    misses = [i for i, hit in enumerate(taken) if not hit]
    assert len(taken) >= 8 and len(misses) <= 4  # two matrices, two sides, at step 0
    assert all(taken[8:])
    monkeypatch.undo()
    plain = make(**options)
    steps(*plain, range(20))
    assert_same(fetched, plain)
    assert not plain[1]._shared.tensors() and fetched[1]._shared.tensors()


@pytest.mark.parametrize(("columns", "fetched"), [(512, True), (700, False)])
def test_a_part_of_a_pool_is_the_same_pool_in_every_step(
    columns: int, fetched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a DTensor in blocks, seen by a new view each time; and none with gaps between its rows."""
    hits: Taken = []
    take = ahead.Ahead.take

    def noted(self: ahead.Ahead, side: int, pool: Tensor, entries: Any) -> Tensor | None:
        rows = take(self, side, pool, entries)
        if side == 0:  # A, of the columns that are in blocks
            hits.append(rows is not None)
        return rows

    monkeypatch.setattr(ahead, "apart", lambda pool, factor: bool(pool.is_contiguous()))
    monkeypatch.setattr(ahead.Ahead, "take", noted)
    with pretended(1, 0):
        layer = nn.Linear(columns, 40, bias=False)
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        optimizer = SwitchLoRAAdamW8bit(
            layer.named_parameters(), lr=0.1, rank=20, interval=4, freeze_steps=1
        )
        for _ in range(6):
            layer.weight.grad = torch.ones_like(layer.weight)
            optimizer.step()
    assert "A.exp_avg_scale" in optimizer.state[layer.weight], "not in blocks"
    assert len(hits) == (6 if fetched else 0) and all(hits[1:])


def test_a_random_order_is_not_fetched(taken: Taken) -> None:
    """What it takes next is not known yet."""
    model, optimizer = of_weights(rank=6, interval=4, freeze_steps=1, order="random")
    steps(model, optimizer, range(8))
    assert not taken and not optimizer._shared.tensors()


def test_pools_within_reach_are_not_fetched() -> None:
    """On the CPU, all."""
    model, optimizer = of_weights(rank=6, interval=4, freeze_steps=1)
    steps(model, optimizer, range(8))
    assert not optimizer._shared.tensors()


@pytest.mark.parametrize("make", [of_weights, of_modules])
def test_what_was_fetched_before_a_checkpoint_is_not_used_after_it(
    make: Made, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded into the very optimizer whose candidates are on their way."""
    options = {"rank": 6, "interval": 4, "freeze_steps": 1}
    first = make(**options)
    steps(*first, range(9))
    saved, weights = runs.saved(first[1]), {k: v.clone() for k, v in first[0].state_dict().items()}
    steps(*first, range(9, 20))
    first[0].load_state_dict(weights)
    first[1].load_state_dict(runs.loaded(saved))
    steps(*first, range(9, 15))
    monkeypatch.undo()
    plain = make(**options)
    steps(*plain, range(15))
    assert_same(first, plain)


def test_a_pool_that_was_written_to_is_read_again(taken: Taken) -> None:
    """By hand, in place: the version of the tensor tells."""
    model, optimizer = of_weights(rank=6, interval=4, freeze_steps=1)
    steps(model, optimizer, range(5))
    state = optimizer.state[model[0].weight]
    state["host.pool_A"].fill_(7.0)
    taken.clear()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    while not taken:
        optimizer.step()
    assert taken == [False, True, True, True]  # A of the first matrix alone
    assert bool((state["basis_A"] == 7.0).all(-1).any())
