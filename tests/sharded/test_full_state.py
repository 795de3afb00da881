"""A whole state of one process, read into several: by rank 0 alone, by every rank, by position."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.sharded.combinations import NAMED, SHORT
from tests.sharded.ranks import Ranks, World
from tests.sharded.training import Case, Trained

Worlds = Callable[[int], Ranks]
WAYS = ("rank 0 tells", "every rank has it", "load_state_dict")
"""Not flattened: torch's loader takes no whole state in that form, of its own AdamW either."""
STEPS = 6
CUTS = ((3, 1), (4, 0), (5, 1))
"""Steps before the change, with a gap of two, and those that the new optimizer had taken."""


def case_of(name: str) -> Case:
    torchs = Case("torch.AdamW", {"foreach": False})
    return replace(torchs if name == "torch" else NAMED[name], only=SHORT, steps=STEPS)


def takes_over(saved: Trained, other: Trained, way: str, rank: int, strict: bool = True) -> None:
    """``other`` gets weights and state of ``saved``, by way of a dict of whole plain tensors."""
    assert saved.model is not None and other.model is not None
    with torch.no_grad():
        for x, y in zip(other.named.values(), saved.named.values(), strict=True):
            x.copy_(y)
    if way == "load_state_dict":
        other.optimizer.load_state_dict(whole_state(saved))
        return
    told = way == "rank 0 tells"
    full = StateDictOptions(full_state_dict=True, cpu_offload=told, strict=strict)
    state = copy.deepcopy(get_optimizer_state_dict(saved.model, saved.optimizer, options=full))
    if way == "rank 0 tells":
        full = replace(full, broadcast_from_rank0=True, cpu_offload=False)
        assert bool(state) == (rank == 0)
    set_optimizer_state_dict(other.model, other.optimizer, state, options=full)


def whole_state(trained: Trained) -> dict[str, Any]:
    """The optimizer's own dict with plain tensors in it, as one process would save it."""
    state = trained.optimizer.state_dict()
    state["state"] = {
        i: {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in entry.items()}
        for i, entry in state["state"].items()
    }
    file = io.BytesIO()
    torch.save(state, file)
    found: dict[str, Any] = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    return found


def assert_same(a: Trained, b: Trained, what: str) -> None:
    """Bit for bit, and in the same places."""
    (w, s), (w0, s0) = a.held(), b.held()
    for name in w0:
        assert torch.equal(w[name][0], w0[name][0]), f"{name} {what}"
        assert s[name].keys() == s0[name].keys(), f"{name} {what}: {s[name].keys()}"
        for key, (x, dim) in s0[name].items():
            assert s[name][key][1] == dim, f"{key} of {name} {what} lies elsewhere"
            assert torch.equal(s[name][key][0], x), f"{key} of {name} {what}"


def goes_on(world: World, case: Case, way: str, cuts: Any = CUTS) -> list[int]:
    """One run that is taken over by other optimizers, which had stepped before or had not."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    differ = []
    for cut, before in cuts:
        one, other = Trained(case, world), Trained(case, world)
        for step in range(cut):
            one.step(step)
        for step in range(before):
            other.step(step)
        mine = [sorted(s) for s in other.optimizer.state.values()]
        takes_over(one, other, way, world.rank)
        theirs = [sorted(s) for s in one.optimizer.state.values()]
        differ.append(sum(a != b for a, b in zip(mine, theirs, strict=False)))
        assert_same(other, one, f"as read after {cut} steps")
        for step in range(cut, case.steps):
            one.step(step)
            other.step(step)
            assert_same(other, one, f"after step {step}, read after {cut}")
    return differ


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("frugal block", WAYS[0]),
        ("dct memory", WAYS[2]),
        ("sst", WAYS[1]),
        pytest.param("torch", WAYS[0], marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_a_whole_state(name: str, way: str, ranks: Worlds) -> None:
    """Bit for bit, whichever blocks are idle there and here."""
    cuts = CUTS[1:] if way == WAYS[0] and name == "frugal block" else CUTS[:1]
    args = {"case": case_of(name), "way": way, "cuts": cuts}
    values = ranks(2).run(f"{name}, {way}", goes_on, **args).checked()
    assert values[0] == values[1]
    if name == "frugal block":
        assert any(values[0]), "the same blocks are idle in all: nothing to tell"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name",
    [
        "svd",
        "fira svd",
        "dct memory",
        "frugal momentum",
        "frugal block",
        "random full",
        "sst",
        "switchlora",
        pytest.param("ldadam", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_a_whole_state_everywhere(name: str, way: str, ranks: Worlds) -> None:
    """On three ranks, some of which have nothing of a matrix."""
    ranks(3).run(f"{name}, {way}", goes_on, case=case_of(name), way=way).checked()


def broken(world: World, case: Case) -> str:
    """What is said where a block in turn lacks a moment, in the dict that rank 0 has."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    one, other = Trained(case, world), Trained(case, world)
    for step in range(STEPS - 1):
        one.step(step)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer, options=full))
    for entry in state.get("state", {}).values():
        if "clock" in entry:
            entry.pop("exp_avg", None)
    told = replace(full, broadcast_from_rank0=True, cpu_offload=False)
    try:
        set_optimizer_state_dict(other.model, other.optimizer, state, options=told)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_block_whose_moments_are_missing_is_an_error_on_every_rank(ranks: Worlds) -> None:
    for said in ranks(2).run("broken", broken, case=case_of("frugal block")).checked():
        assert "state is ['clock', 'exp_avg_sq', 'refresh_step', 'step'] there" in said, said
