"""SLTrain and LOST on several ranks: converted, then split or copied, stepped as by one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowrank_optim import GaLoreAdamW
from lowrank_optim.nn import convert
from tests.compare import assert_close
from tests.sharded.models import left_out, part, shards_whole_numbers
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]


def whole(x: Any) -> Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


def train(world: World | None, method: str, how: str) -> dict[str, Tensor]:
    """Three steps in float64 of a net whose parts do not divide by three."""
    rank, size = (0, 1) if world is None else world
    torch.manual_seed(3)
    model: Any = nn.Sequential(nn.Linear(11, 20), nn.Tanh(), nn.Linear(20, 7)).double()
    groups = convert(model, method, rank=3, density=0.1)
    run = model
    if world is not None and how != "ddp":
        mesh = init_device_mesh("cpu", (size,))
        own = left_out(model, how == "fsdp but for index")
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh, **own)
    elif world is not None:
        run = nn.parallel.DistributedDataParallel(model)
    named = dict(model.named_parameters())
    for group in groups:
        group["params"] = [named[name] for name in group["param_names"]]
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    for step in range(3):
        x, y = (part((n,), step, place, rank, size) for place, n in enumerate((11, 7)))
        optimizer.zero_grad()
        (run(x) - y).square().mean().backward()
        optimizer.step()
    return {name: whole(x) for name, x in model.named_parameters()}


@pytest.mark.parametrize(
    ("method", "how", "size"),
    [
        pytest.param("sltrain", "fsdp", 3, marks=shards_whole_numbers),
        pytest.param("lost", "fsdp", 2, marks=shards_whole_numbers),
        pytest.param("sltrain", "fsdp but for index", 2, marks=shards_whole_numbers),
        ("sltrain", "ddp", 2),
    ],
)
def test_it_is_one_process(method: str, how: str, size: int, ranks: Worlds) -> None:
    expected = train(None, method, how)
    for found in ranks(size).run("from start", train, method=method, how=how).checked():
        assert found.keys() == expected.keys()
        for name, x in found.items():
            assert_close(x, expected[name])
