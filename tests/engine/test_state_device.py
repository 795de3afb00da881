"""Moments in host memory: the numbers of moments on the device, and copies that never race.

The CPU plays the accelerator, with memory and queues of its own (:mod:`tests.engine.races`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import (
    DCTAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    LowRankOptimizer,
    attach_in_backward,
    lowrank_groups,
    methods,
)
from lowrank_optim.engine import step
from lowrank_optim.engine.offload import on_device
from lowrank_optim.engine.plan import moving_keys
from lowrank_optim.memory import estimate, report
from lowrank_optim.nn import convert
from lowrank_optim.ops import devices, queues
from lowrank_optim.stores import STORES
from tests import cases, runs
from tests.backward import nets
from tests.engine.races import Device
from tests.engine.watch import Watch
from tests.pairwise import paired

NAMES = cases.method_names()
STEPS = range(5)
Made = tuple[list[nn.Parameter], LowRankOptimizer]
HOST = {"state_device": "cpu"}


def make(name: str, **options: Any) -> Made:
    params = list(runs.parameters().values())
    return params, cases.build(name, params, rank=3, update_proj_gap=2, **options)


def moments(optimizer: LowRankOptimizer) -> list[Tensor]:
    """All that rests."""
    return [
        optimizer.state[item.param][key]
        for group in optimizer.param_groups
        for item in optimizer._items(group)
        for key in moving_keys(item, optimizer._strategies(group))
        if key in optimizer.state.get(item.param, {})
    ]


def read(device: Device, optimizer: LowRankOptimizer) -> None:
    """The host looks at what is its own, as whoever saves a checkpoint."""
    for x in moments(optimizer):
        device.host(x)


def train(device: Device, made: Made, steps: range = STEPS) -> None:
    for step in steps:
        runs.train(*made, [step])
        read(device, made[1])


def same(a: Made, b: Made) -> None:
    runs.assert_same(a[0], b[0])
    runs.assert_same_state(runs.entries(a[1]), runs.entries(b[1]))


def plain(made: Callable[..., Made], lazy: bool = False, **options: Any) -> Made:
    """A run with the moments on the device."""
    with Device(lazy=lazy) as device:
        found = made(**options)
        train(device, found)
        assert not device.copies and not found[1]._staging.nbytes
    return found


@pytest.mark.parametrize(
    ("name", "state_dtype", "lazy", "on_refresh"),
    paired(NAMES, [*STORES], [False, True], ["keep", "reset", "project"]),
)
def test_numbers_are_those_of_moments_on_the_device(
    name: str, state_dtype: str, lazy: bool, on_refresh: str
) -> None:
    """To the bit, however the queues of a device take turns; tensors of the host stay the same."""
    options = {"state_dtype": state_dtype, "on_refresh": on_refresh}
    expected = plain(make, lazy, name=name, **options)
    with Device(lazy=lazy) as device:
        found = make(name, **options, **HOST)
        train(device, found, STEPS[:2])
        first = moments(found[1])
        train(device, found, STEPS[2:])
        blocks = {id(x) for x in moments(found[1])} != {id(x) for x in first}
        assert not blocks or name.startswith("Frugal")
    assert not device.races
    assert device.copies >= 2 * len(STEPS) * len(first) or blocks
    same(found, expected)


MORE: dict[str, Callable[..., Made]] = {
    "blocks": lambda **own: make("FrugalAdamW", projector="block", **own),
    "blocks-random": lambda **own: make(
        "FrugalAdamW", projector="block", block_order="random", on_refresh="reset", **own
    ),
    "error-feedback": lambda **own: make("DCTAdamW", error_feedback="float32", **own),
    "error-feedback-4bit": lambda **own: make("DCTAdamW", error_feedback="4bit", **own),
    "two-sided": lambda **own: make("FiraAdamW", proj_type="full", on_refresh="project", **own),
    "momentum-none": lambda **own: make("GaLoreSGD", momentum=0.0, **own),
    "maximize": lambda **own: make("GaLoreAdamW", maximize=True, **own),
    "rounded": lambda **own: make(
        "GaLoreAdamW", state_dtype="bfloat16", stochastic_rounding=True, on_refresh="project", **own
    ),
    "pools": lambda **own: make("SwitchLoRAAdamW", interval=2, freeze_steps=1, **own),
    "sst-active": lambda **own: make("SSTAdamW", factors="active", offload_inactive=False, **own),
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", MORE)
def test_numbers_of_every_kind_of_state(kind: str, lazy: bool) -> None:
    expected = plain(MORE[kind], lazy)
    with Device(lazy=lazy) as device:
        found = MORE[kind](**HOST)
        train(device, found)
    assert not device.races
    assert (device.copies > 0) == (kind != "momentum-none")
    same(found, expected)


def layers(method: str, **options: Any) -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12))
    own = {"interval": 2, "freeze_steps": 1} if method == "switchlora" else {"steps_per_iteration": 2}
    groups = convert(model, method, rank=3, **own)
    cls = methods.SwitchLoRAAdamW if method == "switchlora" else methods.SSTAdamW
    return [p for p in model.parameters() if p.requires_grad], cls(groups, lr=1e-2, **options)


@pytest.mark.parametrize("state_dtype", ["float32", "8bit"])
@pytest.mark.parametrize("method", ["sst", "switchlora"])
def test_numbers_of_layers_of_factors(method: str, state_dtype: str) -> None:
    expected = plain(layers, method=method, state_dtype=state_dtype)
    with Device() as device:
        found = layers(method, state_dtype=state_dtype, **HOST)
        train(device, found)
    assert device.copies and not device.races
    runs.assert_same(found[0], expected[0])
    runs.assert_same_state(runs.entries(found[1]), runs.entries(expected[1]))


# ---------------------------------------------------------------- order


@torch.no_grad()
def scenario(device: Device) -> None:
    """A run in which every wait matters: steps, single ones, a step that fails, a refresh apart."""
    params, optimizer = make("GaLoreAdamW", on_refresh="project", **HOST)
    train(device, (params, optimizer), range(3))
    (group,) = optimizer.param_groups
    item = optimizer._items(group)[0]
    for number in range(2):  # as inside backward: nobody waits between
        runs.set_grads(params, number)
        optimizer._step_alone(item, group)
    apart = optimizer._items(group)[1]
    optimizer._step_alone(apart, group)
    with on_device(apart, optimizer.state[apart.param], optimizer._strategies(group)):
        pass
    device.host(optimizer.state[apart.param]["low.exp_avg"], writes=True)
    runs.set_grads(params, 7)
    fails(optimizer, 2)
    for x in moments(optimizer):
        device.host(x, writes=True)
    train(device, (params, optimizer), range(3, 6))


def fails(optimizer: LowRankOptimizer, at: int) -> None:
    """A step in which the bucket after ``at`` others raises, with the next on its way."""
    count, real = [0], step.step_bucket

    def breaks(bucket: Any) -> None:
        real(bucket) if count[0] < at else (_ for _ in ()).throw(MemoryError("no memory left"))
        count[0] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "step_bucket", breaks)
        with pytest.raises(MemoryError):
            optimizer.step()


def test_nothing_races_and_every_wait_is_needed() -> None:
    """Fetched before use, returned after it, a buffer and a tensor used again once they are free.

    Each wait of the package is left out in turn, and each time something races.
    """
    with Device() as device:
        scenario(device)
    assert not device.races
    assert len(device.waits) >= 8, device.waits
    for place in device.waits:
        with Device(without=place) as device:
            scenario(device)
        assert device.races, f"{place} could be left out"
