"""Rank 0 reads a checkpoint and tells the others: also of blocks, whose entries come and go."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import LowRankOptimizer, lowrank_groups, methods
from lowrank_optim.ops import quant
from tests import runs
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]

STEPS, GAP = 9, 3
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("FrugalAdamW", {"projector": "block", "density": 0.34}),
    "block 8bit": ("FrugalAdamW8bit", {"projector": "block", "density": 0.34}),
    "ascending": (
        "FrugalSGD",
        {"projector": "block", "density": 0.34, "block_order": "ascending", "momentum": 0.9},
    ),
    "columns": ("FrugalAdamW", {"projector": "columns", "density": 0.34}),
    "galore": ("GaLoreAdamW", {"rank": 3}),
}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
TOLD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def made(case: str) -> tuple[nn.Module, LowRankOptimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(
        *[layer for _ in range(3) for layer in (nn.Linear(8, 10), nn.Linear(10, 8))]
    )
    name, options = CASES[case]
    own = dict(options)
    ranked = {"density": own.pop("density")} if "density" in own else {"rank": own.pop("rank")}
    groups = lowrank_groups(net, **ranked)
    optimizer = getattr(methods, name)(groups, lr=0.01, update_proj_gap=GAP, **own)
    return DistributedDataParallel(net), optimizer


def trained(model: nn.Module, optimizer: LowRankOptimizer, steps: range, rank: int) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def active(optimizer: LowRankOptimizer) -> list[bool]:
    return ["exp_avg" in s or "momentum_buffer" in s for s in optimizer.state.values()]


def goes_on(world: World, case: str, cut: int, before: int) -> None:
    """An optimizer that has taken ``before`` steps goes on from one that has taken ``cut``."""
    rank = world.rank
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "MIN_SIZE", 30)
        _goes_on(case, cut, before, rank)


def _goes_on(case: str, cut: int, before: int, rank: int) -> None:
    model, optimizer = made(case)
    trained(model, optimizer, range(cut), rank)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    twin, resumed = made(case)
    trained(twin, resumed, range(before), rank)
    if case == "block" and cut == 8 and not before:
        assert active(optimizer) != active(made_and_stepped(case, rank)), "nothing to tell"
    set_optimizer_state_dict(twin, resumed, saved if rank == 0 else {}, options=TOLD)
    twin.load_state_dict(model.state_dict())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))
    trained(model, optimizer, range(cut, STEPS), rank)
    trained(twin, resumed, range(cut, STEPS), rank)
    runs.assert_same(twin.parameters(), model.parameters())
    runs.assert_same_state(runs.entries(resumed), runs.entries(optimizer))


def made_and_stepped(case: str, rank: int) -> LowRankOptimizer:
    model, optimizer = made(case)
    trained(model, optimizer, range(1), rank)
    return optimizer


def broken(world: World) -> None:
    """A block in turn whose moments are missing is an error on every rank: none waits for them."""
    rank = world.rank
    model, optimizer = made("block")
    trained(model, optimizer, range(8), rank)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    for entry in saved.get("state", {}).values():
        if entry.get("clock") is not None:
            entry.pop("exp_avg", None)
    twin, resumed = made("block")
    with pytest.raises(
        ValueError, match=r"state is \['clock', 'exp_avg_sq', .* there and \['clock'"
    ):
        set_optimizer_state_dict(twin, resumed, saved if rank == 0 else {}, options=TOLD)


@pytest.mark.parametrize(
    ("case", "cut", "before"),
    [
        pytest.param(*row, marks=() if at[0] % 6 == at[1] * 2 + at[2] else pytest.mark.slow)
        for at in itertools.product(range(len(CASES)), range(3), range(2))
        for row in [([*CASES][at[0]], (4, 6, 8)[at[1]], (0, 2)[at[2]])]
    ],
)
def test_a_run_goes_on_from_what_rank_0_tells(
    case: str, cut: int, before: int, ranks: Worlds
) -> None:
    """Bit for bit on both: idle blocks differ between a checkpoint and who loads it."""
    args = {"case": case, "cut": cut, "before": before}
    ranks(2).run(f"{case}, {cut}, {before}", goes_on, **args).checked()


def test_a_block_whose_moments_are_missing_is_an_error_on_every_rank(ranks: Worlds) -> None:
    ranks(2).run("broken", broken).checked()
