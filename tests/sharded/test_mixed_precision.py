"""FSDP2's mixed precision: float32 weights, of which layers see bfloat16 copies."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lowrank_optim
from lowrank_optim import lowrank_groups
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "galore": ("GaLoreAdamW", {"rank": 3}, {"update_proj_gap": 3, "projector": "svd"}),
    "fira": ("FiraAdamW", {"rank": 3}, {"update_proj_gap": 3}),
    "dct": ("DCTAdamW", {"rank": 3}, {"error_feedback": "bfloat16"}),
    "frugal": ("FrugalAdamW", {"density": 0.34}, {"update_proj_gap": 3}),
    "ldadam": ("LDAdamW", {"rank": 3}, {"error_feedback": "bfloat16"}),
}


def made(name: str, model: nn.Module) -> Any:
    cls, size, options = OPTIMIZERS[name]
    return getattr(lowrank_optim, cls)(lowrank_groups(model, **size), lr=1e-2, **options)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 15), nn.Tanh(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 8))


def loss_of(model: nn.Module, step: int, rank: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, 10, generator=generator)[rank::size].bfloat16()
    y = torch.randn(24, 8, generator=generator)[rank::size]
    return (model(x).float() - y).square().mean()


def set_mean_grads(model: nn.Module, step: int, size: int) -> None:
    """What all ranks together would find: bfloat16 inside layers, float32 between ranks."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    for rank in range(size):
        narrow = copy.deepcopy(model).bfloat16()
        loss_of(narrow, step, rank, size).backward()
        for param, x in zip(model.parameters(), narrow.parameters(), strict=True):
            param.grad += x.grad.float() / size


def trained(world: World, which: str) -> float:
    """The largest difference after a step, each from the same weights: roundings would differ."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model, expected = net(), net()
    mesh = init_device_mesh("cpu", (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer, reference = made(which, model), made(which, expected)
    most = 0.0
    for step in range(8):
        loss_of(model, step, *world).backward()
        set_mean_grads(expected, step, world.size)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.2).full_tensor()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(expected.parameters(), 0.2))
        before = [p.detach().clone() for p in expected.parameters()]
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        pairs = zip(model.parameters(), expected.parameters(), before, strict=True)
        for mine, x, start in pairs:
            assert mine.dtype == torch.float32
            assert not torch.equal(x, start)
            now = mine.full_tensor().detach()
            most = max(most, float((now - x.detach()).abs().max()))
            x.detach().copy_(now)
    return most


@pytest.mark.parametrize(
    "name",
    [x if x == "fira" else pytest.param(x, marks=pytest.mark.slow) for x in OPTIMIZERS],
)
def test_float32_weights_of_bfloat16_layers(name: str, ranks: Worlds) -> None:
    """Weights and the clipped norm are those of the same arithmetic in one process."""
    for most in ranks(2).run(name, trained, which=name).checked():
        assert most < 1e-6, most
