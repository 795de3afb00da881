"""Weights and state on the host while the mesh is of an accelerator, as under CPUOffloadPolicy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

import lowrank_optim
from tests.sharded import training
from tests.sharded.combinations import NAMED, SHORT
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]


def test_offloaded_weights_train_as_one_process(ranks: Worlds) -> None:
    case = replace(NAMED["fira svd"], how="fsdp offloaded", only=SHORT)
    values = ranks(2).run("offloaded", training.train, case=case).checked()
    run = training.assembled(values)
    training.assert_equal_runs(run, training.reference(case.reference))
    training.assert_all_moved(case.reference, run)


ROWS, COLUMNS = 6, 16


def drawn(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)


def elsewhere(world: World | None, cls: str, options: dict[str, Any]) -> Any:
    """Shards on the host, of a mesh of another device; a state is saved and loaded on the way."""
    logging.disable(logging.WARNING)

    def part(x: Tensor) -> Tensor:
        if world is None:
            return x.clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "set_device", lambda *_: None)
            mesh = init_device_mesh("cuda", (world.size,))
        own = x.chunk(world.size)[world.rank].clone()
        spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=TensorMeta(x.shape, x.stride(), x.dtype))
        return DTensor(own, spec, requires_grad=False)

    weight = nn.Parameter(part(drawn(0)))

    def make() -> Any:
        own = {"lr": 1e-2, "rank": 2, "update_proj_gap": 2, **options}
        return getattr(lowrank_optim, cls)([("weight", weight)], **own)

    optimizer = make()
    for step in range(1, 7):
        weight.grad = part(drawn(step))
        optimizer.step()
        if step == 3:
            saved, optimizer = optimizer.state_dict(), make()
            optimizer.load_state_dict(saved)
    devices = {x.device.type for x in optimizer.state[weight].values()}
    local = weight.detach()
    return local.to_local() if isinstance(local, DTensor) else local, devices


@pytest.mark.parametrize(
    ("cls", "options"),
    [("GaLoreAdamW", {"projector": "svd", "on_refresh": "project"}), ("FiraAdamW", {})],
)
def test_state_stays_with_the_weight(cls: str, options: dict[str, Any], ranks: Worlds) -> None:
    """No machine of the tests has the mesh's device: whatever went there would raise."""
    expected, _ = elsewhere(None, cls, options)
    values = ranks(3).run(cls, elsewhere, cls=cls, options=options).checked()
    assert {device for _, devices in values for device in devices} == {"cpu"}
    gap = (torch.cat([x for x, _ in values]) - expected).abs().max()
    assert float(gap) <= training.WEIGHTS


def without_backend(world: World, rank: Any) -> Any:
    """What is said where the group of a mesh is of NCCL alone."""
    logging.disable(logging.WARNING)
    mesh = init_device_mesh("cpu", (world.size,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 8), mesh, [Shard(0)]))
    before = weight.detach().to_local().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda *_: "cuda:nccl")
        try:
            group: Any = {"params": [("layer.weight", weight)], "rank": rank}
            optimizer = lowrank_optim.GaLoreAdamW([group], lr=0.1)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        except RuntimeError as error:
            return str(error), torch.equal(weight.detach().to_local(), before)
    return "nothing", False


@pytest.mark.parametrize("rank", [2, None])
def test_a_group_without_a_backend_for_the_host_is_told(rank: Any, ranks: Worlds) -> None:
    for said, same in ranks(2).run("backend", without_backend, rank=rank).checked():
        for word in ("layer.weight", "cuda:nccl", 'init_process_group("cpu:gloo,cuda:nccl")'):
            assert word in said, said
        assert same
