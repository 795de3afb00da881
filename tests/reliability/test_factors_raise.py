"""A step of SwitchLoRA that raises on an accelerator: rows alone of its state were copied."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_optim import LowRankOptimizer, SwitchLoRAAdamW, ops
from lowrank_optim.engine import step as engine_step
from lowrank_optim.nn import convert
from lowrank_optim.ops import quant
from tests import cases
from tests.engine.races import Device
from tests.engine.snapshots import everything, same
from tests.logged import Logged
from tests.reliability.injection import OutOfMemory
from tests.reliability.test_step_raises import copied, set_grads

COUNT, SHAPE, RANK, STEPS = 2, (9, 11), 6, 4
OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_dtype": "8bit", "order": "random", "freeze_step_counter": False},
    {"state_dtype": "4bit", "restart_every": 3, "pool_device": "param"},
    {"state_device": "cpu"},
]
"""Formats of moments; candidates in turn and not; what starts again with the counter alone;
moments that rest on the host."""


@pytest.fixture(autouse=True)
def codes_of_small_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of 8 and 4 bits are codes here, small as they are."""
    monkeypatch.setattr(quant, "MIN_SIZE", 20)


def switching(options: dict[str, Any]) -> LowRankOptimizer:
    """Vectors switch in each step, and thaw in the next."""
    params = [
        nn.Parameter(cases.parameter(SHAPE, torch.float32, seed=7).detach()) for _ in range(COUNT)
    ]
    own = {"rank": RANK, "interval": 4, "freeze_steps": 1, "weight_decay": 0.1, **options}
    return cases.build("SwitchLoRAAdamW", params, **own)


class Fault(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_a_switch_has_written_is_put_back(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all of a refresh, and before an operation of it, at each of some steps."""
    cases.branching(monkeypatch, lambda _: True)
    with Device() if "state_device" in options else nullcontext():
        each_step(switching(options), monkeypatch)


def each_step(base: LowRankOptimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for row in range(STEPS):
        set_grads(base, row)
        for key, x in [own for state in base.state.values() for own in state.items()]:
            if "exp_avg" in key and x.is_floating_point():
                x.add_(1)  # or moments of frozen rows are zero, and who restarts them does nothing
        before, whole, cut, counting = everything(base), copied(base), copied(base), OutOfMemory()

        def fails(*args: Any, seen: OutOfMemory = counting) -> None:
            raise Fault(len(seen.names))

        with monkeypatch.context() as patch:
            # all that refreshes write is written, and nothing else
            patch.setattr(engine_step, "written", fails)
            with pytest.raises(Fault) as fault, counting:
                whole.step()
            failing = OutOfMemory(fault.value.args[0] * (row + 1) // (STEPS + 1))
            with pytest.raises(torch.OutOfMemoryError), failing:
                cut.step()
        base.step()
        for again in (whole, cut):
            found = everything(again)  # the state of a first step may have been made
            assert not same({key: found[key] for key in before}, before), row
            again.step()
            assert not same(everything(again), everything(base)), row


@pytest.mark.parametrize(
    ("name", "options"),
    [("SSTAdamW", {"factors": "active", "state_device": "cpu"}), ("SwitchLoRAAdamW", {})],
)
def test_factors_without_their_weight_are_named(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """Those of a bucket are stepped where they lie before the first of its weights is written."""
    params = [nn.Parameter(cases.parameter(SHAPE, torch.float32).detach()) for _ in range(COUNT)]
    cases.branching(monkeypatch, lambda _: True)
    with Device():
        optimizer = cases.build(name, params, rank=RANK, weight_decay=0.0, **options)
        for row in range(2):
            set_grads(optimizer, row)
            optimizer.step()
        set_grads(optimizer, 2)
        before, honest, lifts = everything(optimizer), ops.lift_add_, []

        def lift(*args: Any) -> None:
            lifts.append(args)
            if len(lifts) == COUNT:
                raise Fault
            honest(*args)

        with monkeypatch.context() as patch, pytest.raises(Fault) as caught:
            patch.setattr(ops, "lift_add_", lift)
            optimizer.step()
        (_, note) = caught.value.__notes__
        assert "parameter 1 may have been stepped in part" in note and "parameter 0" not in note
        changed = same(everything(optimizer), before)
        assert "0" in changed and "1" not in changed and "1.step" not in changed
        assert any(key.startswith("1.basis_") for key in changed)
        logged.clear()
        optimizer.step()  # the other alone
        (record,) = logged.records
        assert "may have stepped parameter 1 in part" in record.getMessage()
        counts = [float(optimizer.state[p]["step"]) for p in params]
        assert counts == [3, 3] and "1" in same(everything(optimizer), before)


@pytest.mark.parametrize(("width", "accelerated"), [(16, False), (300, False), (16, True)])
def test_weights_that_a_switch_has_moved_are_put_back_or_named(
    width: int, accelerated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small W0 of a host is copied. Factors are as they were in any case."""
    net = nn.Sequential(nn.Linear(width, width, bias=False))
    optimizer = SwitchLoRAAdamW(
        convert(net, "switchlora", rank=8), lr=1e-2, interval=4, freeze_steps=1
    )
    cases.branching(monkeypatch, lambda _: accelerated)

    def backward() -> None:
        optimizer.zero_grad()
        net(torch.ones(3, width)).square().mean().backward()

    for _ in range(2):
        backward()
        optimizer.step()
    backward()
    before = {key: x.clone() for key, x in net.state_dict().items()}

    def fails(*args: Any) -> None:
        raise Fault

    with monkeypatch.context() as patch, pytest.raises(Fault) as caught:
        patch.setattr(engine_step, "written", fails)
        optimizer.step()
    changed = [key for key, x in net.state_dict().items() if not torch.equal(x, before[key])]
    named = any("0.lora_A may have been stepped in part" in x for x in caught.value.__notes__)
    assert changed == ["0.weight"] * named and named == (width == 300 or accelerated)
