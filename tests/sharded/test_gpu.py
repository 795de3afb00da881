"""DTensors and DistributedDataParallel on a GPU, by NCCL: one rank, whose run is that without."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import attach_in_backward
from lowrank_optim.distributed import shard_placement_fn
from lowrank_optim.ops import devices
from tests import cases
from tests.compare import relative

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BACKENDS = {"cuda": "nccl", "cpu": "gloo"}
CASES = [
    ("GaLoreAdamW", {"projector": "rsvd"}),
    ("GaLoreAdamW8bit", {"projector": "svd"}),
    ("GaLoreAdamW", {"projector": "columns", "on_refresh": "project"}),
    ("FiraAdamW", {"projector": "dct"}),
    ("FrugalAdamW", {"projector": "block"}),
    ("FrugalAdamW", {"projector": "columns"}),
    ("DCTAdamW", {}),
    ("LDAdamW", {"error_feedback": "8bit"}),
]
STEPS = 5


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)]
)
def world(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    device: str = request.param
    store = dist.HashStore()
    dist.init_process_group(BACKENDS[device], store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh(device, (1,))
    finally:
        dist.destroy_process_group()


def network(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48)).to(device)


def trained(model: nn.Module, name: str, options: dict[str, Any], mode: Any = None) -> list[Tensor]:
    """How far each weight went."""
    device = next(model.parameters()).device.type
    starts = [whole(p) for p in model.parameters()]
    optimizer = cases.build(name, model.named_parameters(), **{"update_proj_gap": 2, **options})
    if mode is not None:
        attach_in_backward(optimizer, mode)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(6, 48, generator=generator).to(device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p) - start for p, start in zip(model.parameters(), starts, strict=True)]


def whole(p: Tensor) -> Tensor:
    full = p.full_tensor() if isinstance(p, DTensor) else p
    return full.detach().cpu().double()


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 1e-3 and float(b.norm()) > 0


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_fully_shard(world: DeviceMesh, name: str, options: dict[str, Any]) -> None:
    model = network(world.device_type)
    plain = trained(copy.deepcopy(model), name, options)
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=world, shard_placement_fn=shard_placement_fn(1))
    fully_shard(model, mesh=world)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    close(trained(model, name, options), plain)


@pytest.mark.parametrize("mode", ["project", "step"])
def test_fully_shard_inside_backward(world: DeviceMesh, mode: str) -> None:
    """With the first basis of the gradient of a step, as shards have it."""
    name, options = CASES[0]
    model = network(world.device_type)
    plain = trained(copy.deepcopy(model), name, options)
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=world, shard_placement_fn=shard_placement_fn(1))
    fully_shard(model, mesh=world)
    close(trained(model, name, options, mode), plain)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_distributed_data_parallel(world: DeviceMesh, name: str, options: dict[str, Any]) -> None:
    model = network(world.device_type)
    plain = trained(copy.deepcopy(model), name, options)
    close(trained(DistributedDataParallel(model), name, options), plain)


@pytest.mark.parametrize("pretended", [False, True])
@pytest.mark.parametrize("name", ["GaLoreAdamW", "LDAdamW"])
def test_a_bad_gradient_changes_nothing_of_shards(
    world: DeviceMesh, name: str, pretended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device nobody looks: weights, basis, moments and errors are selected."""
    counted = {"step", "postponed"}
    if pretended:  # a CPU does what a GPU is asked to do
        monkeypatch.setattr(devices, "HOSTS", frozenset())
    if pretended or world.device_type == "cuda":  # a basis is due next time whatever came of this
        counted.add("refresh_step")
    model = network(world.device_type)
    fully_shard(model, mesh=world, shard_placement_fn=shard_placement_fn(1))
    optimizer = cases.build(name, model.named_parameters(), update_proj_gap=1)
    for step in range(4):
        model(torch.full((6, 48), 0.1 * step, device=world.device_type)).square().mean().backward()
        if step == 2:
            bad = next(iter(model.parameters()))
            assert bad.grad is not None
            local(bad.grad)[0, 0] = float("nan")
            held = {k: local(x).clone() for k, x in optimizer.state[bad].items()}
            before = local(bad.detach()).clone()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            now = {k: local(x) for k, x in optimizer.state[bad].items()}
            moved = [k for k, x in held.items() if not torch.equal(x, now[k])]
            assert set(moved) <= counted
            assert torch.equal(before, local(bad.detach()))
    assert not torch.equal(before, local(bad.detach())), "the next step goes on"


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
