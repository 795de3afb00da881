"""The tests see every collective: without any one kind of them a run is not that of one process."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.sharded import test_adafactor, test_not_finite, training
from tests.sharded.combinations import EIGHT, NAMED
from tests.sharded.mutations import MUTATIONS, SEAM, Mutation, mutated
from tests.sharded.ranks import Outcome, Ranks, World
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
STEPS = 4
ONLY = ("wide", "tall")

SEEN_BY: dict[str, str] = {
    "guard": "svd",
    "scores": "dct",
    "sum of two sides": "svd full",
    "scalars of Fira": "fira svd",
    "means of Adafactor": "adafactor",
    "weights of Adafactor": "adafactor scaled",
    "turn to columns": "rsvd",
    "turn to rows": "frugal svd",
    "edges to blocks": "eight bits",
    "gather to the owner": "svd",
    "broadcast of the basis": "random",
    "sum of SST's u and s": "sst",
    "length of SST's v": "sst",
    "weight to SST's owner": "sst",
    "SST's u and s to all": "sst",
    "SST's v to who has its columns": "sst",
    "sum of one factor of SwitchLoRA": "switchlora",
    "factors to the owner of a restart": "switchlora restarts",
    "one factor of a restart to all": "switchlora restarts",
    "the other to who has its columns": "switchlora restarts",
}
"""A case that uses the collective; that of the guard has a gradient that is not finite."""
CASES = {name: replace(case, only=ONLY) for name, case in NAMED.items()}
CASES["adafactor"] = test_adafactor.case_of("svd", "fsdp", ONLY)
CASES["adafactor scaled"] = test_adafactor.case_of("rsvd relative", "fsdp", ONLY)
CASES["eight bits"] = replace(EIGHT["galore dct"], how="fsdp columns", only=("some blocks",))


@pytest.fixture(scope="module")
def brief() -> Iterator[Ranks]:
    """A world that takes a few seconds of waiting for a hang: here ranks part on purpose."""
    world = Ranks(3, grace=4.0)
    yield world
    world.close()


def train(world: World, case: Case, mutation: Mutation | None, poisoned: bool) -> Any:
    """A short run, with a gradient that is not finite in its second step if ``poisoned``."""
    logging.disable(logging.WARNING)
    trained = Trained(case, world)
    out = []
    with mutated(mutation, world, importlib.import_module(SEAM)) as count:
        for step in range(STEPS):
            trained.backward(step)
            if poisoned and step == 1:
                test_not_finite.poison(trained, POISONED, float("nan"))
            count.in_step = 0
            trained.optimizer.step()
            out.append(trained.held())
    return out, count.changed


POISONED = "blocks.1.tall.weight"


def expected(case: Case, poisoned: bool) -> list[training.Step]:
    if not poisoned:
        return training.reference(case)
    return training.assembled(
        [test_not_finite.run(None, case, POISONED, 1, float("nan"))[1][:STEPS]]
    )


def difference(outcome: Outcome, case: Case, poisoned: bool) -> str:
    """How a run is not that of one process; "" if it is."""
    if outcome.failed:
        return next(error for error in outcome.errors if error)
    steps = [out for out, _ in outcome.values]
    try:
        training.assert_equal_runs(training.assembled(steps), expected(case, poisoned))
    except AssertionError as error:
        return str(error)
    return ""


def without_any(world: Ranks, case: Case, poisoned: bool) -> str:
    """The same of a run that nothing is missing from, once for all mutations of a case."""
    key = repr((case, poisoned))
    if key not in _without_any:
        whole = world.run("all but nothing", train, case=case, mutation=None, poisoned=poisoned)
        whole.checked()
        _without_any[key] = difference(whole, case, poisoned)
    return _without_any[key]


_without_any: dict[str, str] = {}


DEFAULT = (
    "guard", "scalars of Fira", "turn to rows", "edges to blocks", "broadcast of the basis",
    "factors to the owner of a restart",
)  # fmt: skip
"""Every function of the seam."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in MUTATIONS],
)
def test_a_run_without_it_is_seen(name: str, brief: Ranks) -> None:
    case = replace(CASES[SEEN_BY[name]], steps=STEPS)
    case = replace(case, options={**case.options, "stagger": False})
    poisoned = name == "guard"
    args = {"case": case, "poisoned": poisoned}
    assert without_any(brief, **args) == "", "without a mutation it is one process"
    outcome = brief.run(f"without {name}", train, mutation=MUTATIONS[name], **args)
    found = difference(outcome, case, poisoned)
    if not outcome.failed:
        assert all(changed > 0 for _, changed in outcome.values), f"nothing calls {name}"
    assert found, f"a run without {name} passes for one process's"
    assert "has no attribute" not in found and "ModuleNotFound" not in found, found


# ------------------------------------------------------------------ the mutations themselves


def sum_(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x


def to_columns(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    return out


def stand_in(world: World, function: str, calls: Any, how: Any) -> Any:
    """Two steps of two calls each."""
    seam = sys.modules[__name__]
    out = []
    with mutated(Mutation(function, calls, how), world, seam) as count:
        for _ in range(2):
            count.in_step = 0
            for _ in range(2):
                x = torch.full((world.size,), 1.0 + world.rank)
                out.append(getattr(seam, function)(x).tolist())
    assert getattr(seam, function) is not None
    return out, count.changed


WHAT: dict[str, tuple[dict[str, str], list[list[float]], int]] = {
    "all": ({"function": "sum_", "calls": "all", "how": "skip"}, [[1.0, 1.0]] * 4, 4),
    "first": (
        {"function": "sum_", "calls": "first", "how": "skip"},
        [[1.0, 1.0], [3.0, 3.0]] * 2,
        2,
    ),
    "later": (
        {"function": "sum_", "calls": "later", "how": "skip"},
        [[3.0, 3.0], [1.0, 1.0]] * 2,
        2,
    ),
    "turned": (
        {"function": "to_columns", "calls": "all", "how": "one rank"},
        [[1.0, 0.0]] * 4,
        4,
    ),
}
"""A mutation, what the first rank gets of two steps with two calls each, and how many changed."""


@pytest.mark.parametrize("name", WHAT)
def test_what_a_mutation_does(name: str, ranks: Worlds) -> None:
    args, expected, changed = WHAT[name]
    first, _ = ranks(2).run(name, stand_in, **args).checked()
    assert first == (expected, changed)
