"""Replicas stay the same to the bit though ranks have other numbers of threads.

A library that splits a product over two threads adds it up in another order. What a rank finds by
itself is then another basis, and replicas part: in silence, and for good.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lowrank_optim
from lowrank_optim.nn import convert
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
STEPS = 50
WIDTH, INNER = 192, 320
SST: dict[str, Any] = {"steps_per_iteration": 10, "iterations_per_round": 2, "warmup_steps": 2}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "svd": ("GaLoreAdamW", {"projector": "svd"}),
    "svd of both sides": ("GaLoreSGD", {"projector": "svd", "proj_type": "full", "lr": 1.0}),
    "rsvd": ("GaLoreAdamW", {"projector": "rsvd"}),
    "random": ("GaLoreAdamW", {"projector": "random"}),
    "fira svd": ("FiraAdamW", {"projector": "svd"}),
    "frugal svd": ("FrugalSGD", {"projector": "svd", "momentum": 0.9}),
    "frugal lion svd": ("FrugalLion", {"projector": "svd"}),
    "sst": ("SSTAdamW", SST),
    "sst modules": ("SSTAdamW", SST),
    "sst active": ("SSTAdamW", {**SST, "factors": "active"}),
    "switchlora": ("SwitchLoRAAdamW", {"interval": 10, "freeze_steps": 2, "total_steps": 100}),
    "dct": ("DCTAdamW", {}),
    "dct memory": ("DCTAdamW", {"error_feedback": "float32"}),
    "columns": ("FrugalAdamW", {"projector": "columns"}),
    "ldadam": ("LDAdamW", {}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    last = nn.Linear(INNER, WIDTH, bias=False)
    return nn.Sequential(nn.Linear(WIDTH, INNER, bias=False), nn.Tanh(), last)


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(WIDTH, WIDTH, generator=generator)


def train(world: World, case: str, unequal: bool) -> list[list[Tensor]]:
    """Weights after every tenth step."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 + world.rank if unequal else 1)
    model = network()
    cls, options = CASES[case]
    own: dict[str, Any] = {"lr": 1e-2, **options}
    params: Any = model.named_parameters()
    if case.endswith("modules"):
        params = convert(model, "sst", rank=WIDTH // 4)
    else:
        own["density" if cls.startswith("Frugal") else "rank"] = 0.25
    if cls.startswith(("GaLore", "Fira", "Frugal")):
        own["update_proj_gap"] = 10
    optimizer = getattr(lowrank_optim, cls)(params, **own)
    ddp = DistributedDataParallel(model)
    out = []
    for step in range(STEPS):
        optimizer.zero_grad()
        ddp(batch(step, world.rank)).square().mean().backward()
        optimizer.step()
        if step % 10 == 9:
            out.append([p.detach().clone() for p in model.parameters()])
    return out


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replicas_are_the_same_bits(case: str, ranks: Worlds) -> None:
    first, second = ranks(2).run(case, train, case=case, unequal=True).checked()
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert apart(a, b) == 0, f"{apart(a, b):.1e} apart after {10 * i + 10} steps"
    assert apart(first[-1], first[0]) > 1e-3
    assert all(bool(x.isfinite().all()) for x in first[-1])


def decompositions(world: World) -> Any:
    """What threads change: singular vectors."""
    torch.set_num_threads(1 + world.rank)
    x = batch(3, 0)
    u = torch.linalg.svd(torch.cat([x, x.roll(1, 0)], 1)[:, :INNER], full_matrices=False)[0]
    return u


@pytest.mark.slow
def test_threads_change_bits_here(ranks: Worlds) -> None:
    """Else the tests above show nothing."""
    first, second = ranks(2).run("svd", decompositions).checked()
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["svd", "rsvd", "fira svd"])
def test_with_equal_threads_it_changes_nothing(case: str, ranks: Worlds) -> None:
    """The owner's basis is that of every rank where all would find the same."""
    first, second = ranks(2).run(case, train, case=case, unequal=False).checked()
    for a, b in zip(first, second, strict=True):
        assert apart(a, b) == 0
