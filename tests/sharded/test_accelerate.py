"""FSDP2 as accelerate makes it: it shards a model under an optimizer that is there already."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lowrank_optim
from lowrank_optim import attach_in_backward, lowrank_groups
from tests.sharded.accelerated import accelerate, fsdp
from tests.sharded.ranks import Ranks, World

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="its FSDP2 takes a mesh of whatever accelerator there is"
)

Worlds = Callable[[int], Ranks]
BATCH = 24


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(10, 15), nn.Tanh(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 10)]
    return nn.Sequential(*layers).double()


def loss_of(model: nn.Module, step: int, rank: int = 0, size: int = 1) -> Tensor:
    """Of a rank's part of a batch; the mean over ranks is that of the batch."""
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, 10, generator=generator).double()[rank::size] for _ in "xy")
    return F.mse_loss(model(x), y)


OPTIMIZERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "galore": ("GaLoreAdamW", {"rank": 3}, {"update_proj_gap": 2, "projector": "svd"}),
    "fira": ("FiraAdamW", {"rank": 3}, {"update_proj_gap": 2}),
    "dct": ("DCTAdamW", {"rank": 3}, {"error_feedback": "float32"}),
    "frugal": ("FrugalAdamW", {"density": 0.34}, {"update_proj_gap": 2}),
}


def made(name: str, model: nn.Module) -> Any:
    cls, size, options = OPTIMIZERS[name]
    return getattr(lowrank_optim, cls)(lowrank_groups(model, **size), lr=1e-2, **options)


def whole(x: Any) -> Tensor:
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found.detach()


def assert_near(model: nn.Module, expected: nn.Module, what: str) -> None:
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        gap = float((whole(x) - y.detach()).abs().max())
        assert gap < 1e-10, f"{name} is {gap:.1e} from one process {what}"


def limit(world: World) -> float:
    """What norms are clipped to; none where a norm and 1e-6, which clipping adds, are not a sum.

    torch 2.6 adds to what each rank has of a norm: a norm of 2 over two ranks, and 1, are 3.41.
    """
    mesh = init_device_mesh("cpu", (world.size,))
    one = distribute_tensor(torch.ones(2 * world.size, dtype=torch.float64), mesh, [Shard(0)])
    norm: Any = torch.linalg.vector_norm(one)
    sums = abs(float(whole(norm + 1)) - float(whole(norm)) - 1) < 1e-12
    return 0.1 if sums else math.inf


def one_process(model: nn.Module, optimizer: Any, step: int, most: float = 0.1) -> Tensor:
    """A step of the loop written out; the norm before clipping."""
    optimizer.zero_grad()
    loss_of(model, step).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    optimizer.step()
    return norm


def prepared(world: World, which: str, folder: str, state: str, meta: bool) -> None:
    """Steps, a checkpoint in mid-run, and another model and optimizer that read it."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    expected = net()
    reference = made(which, expected)
    options = {"state_dict_type": state, "cpu_ram_efficient_loading": meta}
    with fsdp():
        model, optimizer, accelerator = _ready(options, which, seed=world.rank if meta else 0)
        most = limit(world)
        names = [n for group in optimizer.param_groups for n in group["param_names"]]
        assert sorted(names) == sorted(n for n, _ in expected.named_parameters())
        for step in range(7):
            if step == 4:
                accelerator.save_state(folder)
                accelerator.free_memory()
                model, optimizer, accelerator = _ready(options, which, seed=5)
                accelerator.load_state(folder)
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, step, *world))
            norm = accelerator.clip_grad_norm_(model.parameters(), most)
            optimizer.step()
            expected_norm = one_process(expected, reference, step, most)
            assert abs(float(whole(norm)) - float(expected_norm)) < 1e-10
            assert_near(model, expected, f"after step {step}")


def _ready(options: dict[str, Any], name: str, seed: int) -> Any:
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    model = net(seed)
    model, optimizer = accelerator.prepare(model, made(name, model))
    assert all(hasattr(p, "placements") for p in model.parameters())
    return model, optimizer, accelerator


@pytest.mark.parametrize(
    ("name", "state", "meta"),
    [
        ("galore", "SHARDED_STATE_DICT", False),
        pytest.param("fira", "FULL_STATE_DICT", False, marks=pytest.mark.slow),
        pytest.param("dct", "SHARDED_STATE_DICT", True, marks=pytest.mark.slow),
        ("frugal", "FULL_STATE_DICT", True),
    ],
)
def test_prepare(name: str, state: str, meta: bool, ranks: Worlds, tmp_path: Path) -> None:
    """Weights and norms are those of one process, before and after a checkpoint."""
    args = {"folder": str(tmp_path), "state": state, "meta": meta}
    ranks(2).run(name, prepared, which=name, **args).checked()


def too_late(world: World, how: str) -> str:
    """What is said where a model is sharded under an optimizer that is at work already."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with fsdp():
        plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        model = net()
        optimizer = made("galore", model)
        if how == "stepped":
            loss_of(model, 0).backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            attach_in_backward(optimizer, how)
        model, optimizer = accelerator.prepare(model, optimizer)
        try:
            accelerator.backward(loss_of(model, 1, *world))
            optimizer.step()
        except (NotImplementedError, RuntimeError) as error:
            return str(error)
        return "nothing"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("stepped", "0.weight is not the tensor that the optimizer has a state of, which would"),
        ("step", "0.weight was no DTensor when attach_in_backward was called"),
        ("project", "0.weight was no DTensor when attach_in_backward was called"),
    ],
)
def test_an_optimizer_that_is_at_work(how: str, told: str, ranks: Worlds) -> None:
    """Its state would start again in silence, and gradients that are shards are not whole."""
    for said in ranks(2).run(how, too_late, how=how).checked():
        assert said.startswith(told), said
