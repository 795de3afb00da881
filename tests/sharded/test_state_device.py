"""Moments of shards in host memory: the run of moments on the device, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_optim.engine.state import moving_keys
from lowrank_optim.memory import report
from lowrank_optim.memory.reporting import staging_bytes
from lowrank_optim.sharding.parts import local
from tests.engine.races import Device
from tests.sharded import replicas, test_layers, training
from tests.sharded.combinations import EIGHT, FOUR, NAMED, SHORT
from tests.sharded.models import shards_whole_numbers
from tests.sharded.ranks import Ranks, World

Worlds = Callable[[int], Ranks]
Held = Any


def resting(optimizer: Any) -> list[Tensor]:
    return [
        local(optimizer.state[item.param][key])
        for group in optimizer.param_groups
        for item in optimizer._items(group)
        for key in moving_keys(item, optimizer._strategies(group))
        if key in optimizer.state.get(item.param, {})
    ]


def hosted(case: training.Case) -> training.Case:
    return replace(case, options={**case.options, "state_device": "cpu"})


def both(world: World, cases: Sequence[training.Case]) -> list[str]:
    """What differs between the two settings, of each case; a state is loaded on the way."""
    logging.disable(logging.WARNING)
    return [_differs(world, case) for case in cases]


def _differs(world: World, case: training.Case) -> str:
    found = []
    for own in (case, hosted(case)):
        with Device() as device:
            trained = training.Trained(own, world)
            for step in range(3):  # bases are found in the last too
                trained.step(step)
                for x in resting(trained.optimizer):
                    device.host(x)
                if step == 0:  # buffers are asked for anew, and two steps have them all
                    saved = trained.optimizer.state_dict()
                    trained.optimizer = training.make_optimizer(own, trained.named.items())
                    trained.optimizer.load_state_dict(saved)
            found.append(trained.held())
            held, told = report(trained.optimizer), staging_bytes(trained.optimizer)
            resting_here = sum(x.nbytes for x in resting(trained.optimizer))
        if device.races:
            return f"{own}: {device.races[0]}"
        if own is not case and (held.staging != told or held.host < resting_here):
            return f"{own}: buffers of {held.staging} bytes, {told} were told of"
        if (device.copies > 0) != (own is not case):
            return f"{own}: {device.copies} copies"
    return "" if _alike(*found) else f"{case} differs"


def _alike(a: Held, b: Held) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


CASES = {
    "bases": NAMED["rsvd"],
    "fira": NAMED["fira rsvd"],
    "blocks": NAMED["frugal block"],
    "memory": NAMED["dct memory now and then"],
    "following": NAMED["ldadam"],
    "sst": NAMED["sst"],
    "switchlora": NAMED["switchlora"],
    "columns": replace(NAMED["rsvd"], how="fsdp columns"),
    "adafactor": training.Case("GaLoreAdafactor", {"beta1": 0.9, "on_refresh": "project"}),
}
SHORTEST = SHORT[:2]
FIRST = ("memory", "switchlora", "adafactor")
"""Of bases that are found Adafactor has them; in 8 bits GaLore has, and as a replica."""


@pytest.mark.parametrize(
    "names",
    [FIRST, pytest.param(sorted(CASES.keys() - {*FIRST}), marks=pytest.mark.slow)],
    ids=["some", "all others"],
)
def test_shards_train_with_either_setting(names: Sequence[str], ranks: Worlds) -> None:
    """Every method, in float64: by rows, by columns, and what asks all ranks for sums."""
    cases = [replace(CASES[name], only=SHORTEST) for name in names]
    for found in ranks(2).run("named", both, cases=cases).checked():
        assert found == [""] * len(cases)


@pytest.mark.slow  # codes rest as moments do: tests/engine/test_state_device.py has them
@pytest.mark.parametrize("of", [EIGHT, FOUR], ids=["8", "4"])
def test_shards_in_blocks_train_with_either_setting(
    of: dict[str, training.Case], ranks: Worlds
) -> None:
    """DTensors of blocks, and the memory of error feedback beside them."""
    names = ("galore", "dct memory 8bit", "switchlora", "ldadam")
    cases = [replace(of[name], only=of[name].only[:1]) for name in names]
    for found in ranks(2).run("in blocks", both, cases=cases).checked():
        assert found == [""] * len(cases)


def copies(world: World, runs: Sequence[replicas.Run]) -> list[str]:
    """The same of replicas, whose bases are found outside of buckets."""
    return [_copies_differ(world, run) for run in runs]


def _copies_differ(world: World, run: replicas.Run) -> str:
    found = []
    for own in (run, replace(run, case=hosted(run.case))):
        with Device() as device:
            found.append(replicas.train(world, own))
        if device.races:
            return f"{own}: {device.races[0]}"
    return "" if _alike(*found) else f"{run} differs"


def test_replicas_train_with_either_setting(ranks: Worlds) -> None:
    """Under DDP, and averaged inside backward in both modes."""
    svd = replace(NAMED["svd"], only=SHORTEST, steps=4)
    turned = replace(svd, options={**svd.options, "on_refresh": "project"})
    memory = replace(NAMED["dct memory now and then"], only=SHORTEST, steps=4)
    memory = replace(memory, options={**memory.options, "projector": "svd"})
    following = replace(NAMED["ldadam"], only=SHORTEST, steps=4)
    runs = [
        replicas.Run(turned, "ddp"),
        replicas.Run(memory, "ddp"),
        replicas.Run(following, "ddp"),
        replicas.Run(turned, "project"),
        replicas.Run(turned, "step", told=True),
    ]
    for found in ranks(2).run("replicas", copies, runs=runs).checked():
        assert found == [""] * len(runs)


def layers(world: World, names: Sequence[str]) -> list[str]:
    """The same of layers of factors that ranks have parts of, whose moments are whole on each."""
    return [_layers_differ(world, name) for name in names]


def _layers_differ(world: World, name: str) -> str:
    found = []
    for where in (None, "cpu"):
        with Device() as device:
            trained = test_layers.Layers(test_layers.Chosen(name), world)
            for group in trained.optimizer.param_groups:
                group["state_device"] = where
            for step in range(3):
                trained.step(step)
                for x in resting(trained.optimizer):
                    device.host(x)
            held, told = report(trained.optimizer), staging_bytes(trained.optimizer)
            found.append(trained.held())
        if device.races or (device.copies > 0) != (where == "cpu"):
            return f"{name}: {device.races[:1]}, {device.copies} copies"
        if held.staging != told:
            return f"{name}: buffers of {held.staging} bytes, {told} were told of"
    return "" if _alike(*found) else f"{name} differs"


@pytest.mark.slow  # of weights SST and SwitchLoRA are among those above
@shards_whole_numbers
def test_layers_of_factors_train_with_either_setting(ranks: Worlds) -> None:
    names = ("sst", "restarts")
    for found in ranks(2).run("layers", layers, names=names).checked():
        assert found == [""] * len(names)
