"""A plan on several ranks: all have the same, or none steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank_optim import fit
from lowrank_optim.fitting import Plan
from lowrank_optim.memory.world import sends_without_data
from tests.sharded.ranks import Ranks, World


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False))


def planned(world: World, text: str) -> list[Any]:
    """Ranks of what is planned alike, and what is said of a plan of one rank's own."""
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (world.size,)))
    plan = Plan.from_json(text, model)
    optimizer = plan.optimizer(model, lr=1e-3)
    model(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    own = replace(plan, ranks={**plan.ranks, "0.weight": 8 + 8 * world.rank})
    try:
        own.optimizer(model)
    except RuntimeError as error:
        return [[group.get("rank") for group in optimizer.param_groups], str(error)]
    return []


@pytest.mark.filterwarnings("ignore")
def test_ranks_have_one_plan(ranks: Callable[[int], Ranks]) -> None:
    size = 2 if sends_without_data() else None
    plan = fit(net(), 1.0, world_size=size, optimizers=["GaLoreAdamW"])
    first, second = ranks(2).run("planned", planned, text=plan.to_json()).checked()
    assert first == second and set(first[0]) == set(plan.ranks.values())
    assert first[1].startswith("ranks have different plans")
