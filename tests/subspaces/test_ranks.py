"""Ranks choose alike: bases, indices, vectors and blocks depend on nothing that ranks do not share.

Every process has random numbers of its own in torch's global generator, and data of its own; what
they share is the seed of the optimizer and the averaged gradient.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import LowRankOptimizer, lowrank_groups, methods
from lowrank_optim.nn import convert
from tests import runs
from tests.sharded.ranks import Ranks, World

STEPS = 14
GAP = 3
SST: dict[str, Any] = {"steps_per_iteration": GAP, "iterations_per_round": 2, "warmup_steps": 2}
SWITCH: dict[str, Any] = {"interval": 4, "freeze_steps": 2, "total_steps": 2 * STEPS}
FRUGAL: dict[str, Any] = {"update_proj_gap": GAP, "density": 0.4}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sst": ("SSTAdamW", {**SST}),
    "sst active": ("SSTAdamW", {**SST, "factors": "active", "sampling": "multinomial"}),
    "sst 8bit": ("SSTAdamW8bit", {**SST, "sampling": "uniform"}),
    "sst modules": ("SSTAdamW", {**SST}),
    "switchlora": ("SwitchLoRAAdamW", {**SWITCH}),
    "switchlora random": ("SwitchLoRAAdamW", {**SWITCH, "order": "random", "restart_every": 9}),
    "switchlora modules": ("SwitchLoRAAdamW", {**SWITCH}),
    "frugal blocks": ("FrugalAdamW", {**FRUGAL, "density": 0.5}),
    "frugal columns": ("FrugalAdamW", {**FRUGAL, "projector": "columns"}),
    "frugal rows": ("FrugalSGD", {**FRUGAL, "projector": "rows", "momentum": 0.9}),
    "frugal randk": ("FrugalLion", {**FRUGAL, "projector": "randk", "on_refresh": "project"}),
    "dct": ("DCTAdamW", {"error_feedback": "8bit"}),
    "dct fft": ("DCTAdamW", {"transform": "fft", "update_proj_gap": 2}),
    "rsvd": ("GaLoreAdamW", {"update_proj_gap": GAP, "stochastic_rounding": True}),
    "random": ("FiraAdamW", {"update_proj_gap": GAP, "projector": "random"}),
}
"""What is drawn anew several times within the run, and how it is drawn."""
VARIANTS = (
    "sst active", "sst 8bit", "switchlora random", "frugal columns", "frugal rows", "dct", "random"
)  # fmt: skip
"""Those that draw as another does."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    tall, wide, square = nn.Linear(10, 24), nn.Linear(24, 10), nn.Linear(10, 10, bias=False)
    return nn.Sequential(tall, nn.Tanh(), wide, nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), square)


def make(case: str) -> tuple[nn.Module, LowRankOptimizer]:
    name, options = CASES[case]
    model = network().to(torch.bfloat16 if "stochastic_rounding" in options else torch.float32)
    own = dict(options)
    ranks = {"density": own.pop("density")} if "density" in own else {"rank": 3}
    if case.endswith("modules"):
        groups = convert(model, case.split()[0], rank=3)
    else:
        groups = lowrank_groups(model, **ranks)
    return model, getattr(methods, name)(groups, lr=0.01, **own)


def other_numbers(rank: int) -> None:
    """Global generators of a process that is nobody's twin."""
    torch.manual_seed(100 + rank)
    np.random.seed(100 + rank)


def batch(step: int, rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 10, generator=generator).to(dtype)


def held(model: nn.Module, optimizer: LowRankOptimizer) -> dict[str, Tensor]:
    """All weights and all state, by name."""
    out = {f"model.{k}": v.clone() for k, v in model.state_dict().items()}
    for i, entry in enumerate(runs.entries(optimizer)):
        out |= {f"state.{i}.{k}": v for k, v in entry.items()}
    return out


def work(world: World, case: str) -> list[dict[str, Tensor]]:
    """One rank: a case under DDP, and what it holds after each step."""
    logging.disable(logging.WARNING)
    rank = world.rank
    model, optimizer = make(case)
    dtype = next(model.parameters()).dtype
    ddp = DistributedDataParallel(model)
    other_numbers(rank)
    kept = []
    for step in range(STEPS):
        optimizer.zero_grad()
        ddp(batch(step, rank, dtype)).square().mean().backward()
        optimizer.step()
        kept.append(held(model, optimizer))
    return kept


CHOICES = {
    "sst": "basis_order",
    "sst active": "basis_u",
    "sst 8bit": "basis_order",
    "sst modules": "order",
    "switchlora": "host.held",
    "switchlora random": "host.held",
    "switchlora modules": "host.held",
    "frugal blocks": "refresh_step",
    "frugal columns": "index",
    "frugal rows": "index",
    "frugal randk": "key",
    "dct": "basis_index",
    "dct fft": "basis_index",
    "rsvd": "basis",
    "random": "basis",
}
"""The entry that says what was chosen."""


def changes(run: list[dict[str, Tensor]], entry: str) -> int:
    """At how many steps a matrix chose anew."""
    keys = [k for k in run[-1] if k.endswith(f".{entry}")]
    assert keys, entry
    return sum(
        any(not torch.equal(before[k], after[k]) for k in keys)
        for before, after in itertools.pairwise(run)
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_under_ddp_hold_the_same_bits(
    case: str, ranks: Callable[[int], Ranks]
) -> None:
    """Weights, state and choices after every step, across draws, switches and refreshes."""
    first, second = ranks(2).run(case, work, case=case).checked()
    for step, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.keys() == b.keys(), step
        for key in a:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), (step, key)
    assert changes(first, CHOICES[case]) >= 3


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in VARIANTS else ()) for x in CASES]
)
def test_two_optimizers_choose_alike(case: str) -> None:
    """The same in one process: two optimizers on the same gradients, other global numbers each."""
    ends = []
    for rank in range(2):
        model, optimizer = make(case)
        dtype = next(model.parameters()).dtype
        other_numbers(rank)
        run = []
        for step in range(STEPS):
            optimizer.zero_grad()
            model(batch(step, 0, dtype)).square().mean().backward()
            torch.rand(rank + 1)
            optimizer.step()
            run.append(held(model, optimizer))
        ends.append(run)
    for a, b in zip(*ends, strict=True):
        runs.assert_same_state([a], [b])
    assert changes(ends[0], CHOICES[case]) >= 3
