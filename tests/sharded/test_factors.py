"""Factors of shards on an accelerator: stepped where they lie, and switched rows put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lowrank_optim.engine.sharded import step as sharded_step
from tests import cases
from tests.sharded import training
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
SWITCH = {"rank": 3, "interval": 3, "freeze_steps": 1, "total_steps": 100}
RUNS = {
    "SwitchLoRA": Case("SwitchLoRAAdamW", SWITCH),
    "SST": Case("SSTAdamW", {"rank": 3, "factors": "active", "steps_per_iteration": 2}),
}


class Fault(Exception):
    """Raised on purpose."""


def fails(*args: Any) -> None:
    raise Fault


def on_devices(world: World | None, case: Case) -> tuple[Any, list[str]]:
    """A run, and what is not put back of a step that has refreshed and does no more."""
    with pytest.MonkeyPatch.context() as patch:
        cases.branching(patch, lambda _: True)
        trained = Trained(case, world)
        for step in range(case.steps):
            trained.step(step)
        found = trained.held()
        trained.backward(case.steps)
        patch.setattr(sharded_step, "step_chunks", fails)
        with pytest.raises(Fault):
            trained.optimizer.step()
        (weights, states), (weights0, states0) = trained.held(), found
        left = [name for name in weights0 if not weights[name][0].equal(weights0[name][0])]
        for name, own in states0.items():
            read = {key: x for key, (x, _) in own.items() if "pool_" not in key}
            left += [f"{name} {k}" for k, x in read.items() if not states[name][k][0].equal(x)]
        return found, left


@pytest.mark.parametrize("name", RUNS)
def test_factors_of_shards_on_a_device(name: str, ranks: Worlds) -> None:
    """By rows and by columns, as one process that makes new factors beside the old ones."""
    case = RUNS[name]
    case = Case(
        case.cls, case.options, how="tensors", only=("wide", "tall"), places=("0", "1"), steps=4
    )
    found = ranks(2).run(name, on_devices, case=case).checked()
    assert all(not left for _, left in found), found[0][1]
    one = Trained(case.reference)
    for step in range(case.steps):
        one.step(step)
    runs = training.assembled([[run] for run, _ in found])
    training.assert_equal_runs(runs, training.assembled([[one.held()]]))
