"""A run that goes from one number of ranks to another is one run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lowrank_optim.checkpoints import hold_blocks, in_blocks
from lowrank_optim.optimizer import LowRankOptimizer
from tests.sharded import training
from tests.sharded.combinations import BLOCKS, EIGHT, NAMED
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
LEG = 3
"""Steps between two changes, every other one where half of the bases are due."""
ROUTE = (3, 1, 4, 2, 3)
SHORT = ("wide", "tall", "few", "experts")
METHODS = (
    "rsvd",
    "svd full",
    "fira svd",
    "dct memory",
    "hadamard",
    "frugal columns",
    "frugal block",
    "frugal momentum",
    "sst",
    "switchlora restarts",
    "ldadam",
)


def save(trained: Trained, folder: str, flat: bool) -> None:
    assert trained.model is not None
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {
        "model": get_model_state_dict(trained.model),
        "optimizer": get_optimizer_state_dict(trained.model, trained.optimizer, options=options),
    }
    if isinstance(trained.optimizer, LowRankOptimizer) and not flat:
        state["optimizer"] = in_blocks(trained.optimizer, state["optimizer"])
    dcp.save(state, checkpoint_id=folder)


def load(trained: Trained, folder: str, flat: bool, strict: bool = True) -> None:
    model, optimizer = trained.model, trained.optimizer
    assert model is not None
    options = StateDictOptions(flatten_optimizer_state_dict=flat, strict=strict)
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    planner = None
    if (
        isinstance(optimizer, LowRankOptimizer)
        and optimizer.param_groups[0]["projector"] == "block"
    ):
        hold_blocks(optimizer)
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    if isinstance(optimizer, LowRankOptimizer) and not flat:
        state["optimizer"] = in_blocks(optimizer, state["optimizer"])
    dcp.load(state, checkpoint_id=folder, planner=planner)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def leg(
    world: World, case: Case, begin: int, source: str | None, target: str, flat: bool, plain: bool
) -> Any:
    """Some steps of a run on so many ranks, from a checkpoint to a checkpoint."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = Trained(case, None if plain else world)
        if source is not None:
            with torch.no_grad():
                for param in trained.named.values():
                    param.zero_()  # what is not read is seen
            load(trained, source, flat)
        out = []
        for step in range(begin, begin + LEG):
            trained.step(step)
            out.append(trained.held())
        save(trained, target, flat)
    return out


def check(
    ranks: Worlds,
    name: str,
    case: Case,
    flat: bool,
    folder: Path,
    route: Any,
    plain: bool = True,
) -> None:
    """From leg to leg; one process is plain, or a mesh of one rank."""
    case = replace(case, steps=LEG * len(route))
    expected = training.reference(case.reference)
    source = None
    for i, size in enumerate(route):
        target = str(folder / str(i))
        args = {"case": case, "begin": i * LEG, "source": source, "target": target, "flat": flat}
        title = f"{name}, leg {i} on {size}"
        values = ranks(size).run(title, leg, plain=plain and size == 1, **args).checked()
        part = expected[i * LEG : (i + 1) * LEG]
        training.assert_equal_runs(training.assembled(values), part, case.near)
        source = target


@pytest.mark.slow
@pytest.mark.parametrize("flat", [True])
def test_torch_passes_its_own_measure(flat: bool, ranks: Worlds, tmp_path: Path) -> None:
    case = Case("torch.AdamW", {"foreach": False}, only=SHORT)
    check(ranks, "torch", case, flat, tmp_path, ROUTE[:3])


@pytest.mark.parametrize(
    "name",
    # of a basis that is found test_adafactor.py has as many ranks in turn, and codes have them here
    [
        pytest.param("rsvd", marks=pytest.mark.slow),
        pytest.param("dct memory", marks=pytest.mark.slow),
        "frugal block",
        # test_layers.py has the one, test_full_state.py the next, test_one_process.py the last
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("sst", "switchlora", "ldadam")),
    ],
)
def test_a_run_over_several_numbers_of_ranks_is_one_run(
    name: str, ranks: Worlds, tmp_path: Path
) -> None:
    route = ROUTE[:4] if name == "rsvd" else ROUTE[3:]
    check(ranks, name, replace(NAMED[name], only=SHORT), False, tmp_path, route)


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        pytest.param("frugal rows", True, marks=pytest.mark.slow),
        ("galore", False),
        pytest.param("block", False, marks=pytest.mark.slow),
    ],
)
def test_moments_in_8_bits_over_several_numbers_of_ranks(
    name: str, flat: bool, ranks: Worlds, tmp_path: Path
) -> None:
    """To the bit at every step, so that nothing was encoded again on the way."""
    case = BLOCKS if name == "block" else EIGHT[name]
    check(ranks, name, case, flat, tmp_path, (3, 1, 2), plain=not flat)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", EIGHT)
def test_moments_in_8_bits_over_several_numbers_of_ranks_everywhere(
    name: str, flat: bool, ranks: Worlds, tmp_path: Path
) -> None:
    check(ranks, name, EIGHT[name], flat, tmp_path, ROUTE, plain=not flat)


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("how", ["fsdp", "fsdp columns"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_over_several_numbers_of_ranks_is_one_run_everywhere(
    name: str, how: str, flat: bool, ranks: Worlds, tmp_path: Path
) -> None:
    """There and back, the whole model, by rows and by columns."""
    check(ranks, name, replace(NAMED[name], how=how), flat, tmp_path, ROUTE)


def in_memory(world: World, case: Case, flat: bool, full: bool) -> Any:
    """A new model and a new optimizer take over in mid-run."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full)
    trained = Trained(case, world)
    out = []
    for step in range(case.steps):
        if step == LEG:
            other = Trained(case, world)
            assert trained.model is not None and other.model is not None
            weights = get_model_state_dict(trained.model, options=options)
            state = get_optimizer_state_dict(trained.model, trained.optimizer, options=options)
            set_model_state_dict(other.model, weights, options=options)
            set_optimizer_state_dict(other.model, other.optimizer, state, options=options)
            trained = other
        trained.step(step)
        out.append(trained.held())
    return out


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("torch", True),
        ("fira svd", False),
        pytest.param("dct memory", True, marks=pytest.mark.slow),
    ],
)
def test_another_optimizer_takes_over(name: str, full: bool, ranks: Worlds) -> None:
    torchs = Case("torch.AdamW", {"foreach": False})
    case = replace(torchs if name == "torch" else NAMED[name], only=SHORT, steps=2 * LEG)
    values = ranks(3).run(name, in_memory, case=case, flat=False, full=full).checked()
    training.assert_equal_runs(training.assembled(values), training.reference(case))


def own_methods(world: World, case: Case) -> Any:
    """``state_dict`` and ``load_state_dict`` alone, into the same number of ranks."""
    logging.disable(logging.WARNING)
    trained, other = Trained(case, world), Trained(case, world)
    out = []
    for step in range(case.steps):
        if step == LEG:
            with torch.no_grad():
                for x, y in zip(other.named.values(), trained.named.values(), strict=True):
                    x.copy_(y)
            other.optimizer.load_state_dict(trained.optimizer.state_dict())
            trained = other
        trained.step(step)
        out.append(trained.held())
    return out


@pytest.mark.parametrize(
    "name",
    [
        "torch",
        "frugal block",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("svd", "ldadam")),
    ],
)
def test_the_optimizers_own_methods(name: str, ranks: Worlds) -> None:
    torchs = Case("torch.AdamW", {"foreach": False})
    case = replace(torchs if name == "torch" else NAMED[name], only=SHORT, steps=2 * LEG)
    values = ranks(3).run(name, own_methods, case=case).checked()
    training.assert_equal_runs(training.assembled(values), training.reference(case))
