"""Copies of moments in host memory never race, and a step that raises leaves the host as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import LowRankOptimizer
from lowrank_optim.engine import matrix_step, step
from lowrank_optim.engine.offload import on_device
from lowrank_optim.ops import devices, queues
from tests import cases, runs
from tests.engine.races import Device
from tests.engine.test_state_device import HOST, make, moments, read, train


@torch.no_grad()
def scenario(device: Device) -> None:
    """A run in which every wait matters: steps, single ones, a step that fails, a refresh apart."""
    params, optimizer = make("GaLoreAdamW", on_refresh="project", **HOST)
    train(device, (params, optimizer), range(2))
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
    train(device, (params, optimizer), range(3, 4))


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


# ---------------------------------------------------------------- a step that raises


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("at", "count"), [(0, 0), (2, 3)])
def test_a_step_that_raises_leaves_the_host_as_it_was(at: int, count: int, lazy: bool) -> None:
    """What was done is done, and back on the host; all else is what it was, to the bit."""
    with Device(lazy=lazy) as device:
        found = make("GaLoreAdamW", **HOST)
        train(device, found)
        before = runs.entries(found[1]), [p.detach().clone() for p in found[0]]
        kept = moments(found[1])
        runs.set_grads(found[0], 9)
        fails(found[1], at)
        read(device, found[1])
        assert all(a is b for a, b in zip(kept, moments(found[1]), strict=True))
        moved = [not torch.equal(p, old) for p, old in zip(found[0], before[1], strict=True)]
        assert sum(moved) == count  # the second bucket is of two
        for param, own, old in zip(found[0], moved, before[0], strict=True):
            state = found[1].state[param]
            assert all(torch.equal(state[k], old[k]) for k in old) != own
    assert not device.races


class Breaks(BaseException):
    """Ctrl-C, say."""


@pytest.mark.parametrize("lazy", [False, True])
def test_of_a_bucket_what_is_done_goes_back_alone(
    lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two alike matrices has its step, moments included; the second has none of it.

    An accelerator writes both at once, as a CPU does with such small ones if it is not told
    otherwise, and then neither has any.
    """
    monkeypatch.setattr(matrix_step, "CACHED_ELEMENTS", 0)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 9, generator=generator)) for _ in range(2)]
    grads = [torch.randn(6, 9, generator=generator) for _ in range(2)]

    def made() -> LowRankOptimizer:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return cases.build("GaLoreAdamW", params, **HOST)

    real, calls = step.push, [0]

    def breaks(*args: Any) -> None:
        calls[0] += 1
        # the second step, and of that the second matrix; an accelerator rehearses the first
        if calls[0] == (3 if lazy else 4):
            raise Breaks
        real(*args)

    monkeypatch.setattr(step, "push", breaks)
    with Device(lazy=lazy) as device:
        optimizer = made()
        optimizer.step()
        before, kept = runs.entries(optimizer), moments(optimizer)
        with pytest.raises(Breaks):
            optimizer.step()
        after = runs.entries(optimizer)
    assert not device.races
    assert all(a is b for a, b in zip(kept, moments(optimizer), strict=True))
    if not lazy:
        assert not torch.equal(before[0]["low.exp_avg"], after[0]["low.exp_avg"])
        assert int(after[0]["step"]) == 2
    runs.assert_same_state(after[not lazy :], before[not lazy :])


# ---------------------------------------------------------------- streams of an accelerator


class Streams:
    """What the package asks of ``torch.cuda`` and its siblings; each call is noted."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on = "current"

    def Stream(self, device: torch.device) -> Any:
        return self._stream(f"stream {len({c for c in self.calls if c.startswith('new')})}", True)

    def current_stream(self, device: torch.device) -> Any:
        return self._stream("current", False)

    def _stream(self, name: str, new: bool) -> Any:
        if new:
            self.calls.append(f"new {name}")
        wait = lambda event: self.calls.append(f"{name} waits for {event.at}")  # noqa: E731
        return SimpleNamespace(name=name, wait_event=wait)

    def Event(self) -> Any:
        event = SimpleNamespace(at="nothing")

        def record(stream: Any) -> None:
            event.at = stream.name

        event.record = record
        event.synchronize = lambda: self.calls.append(f"the host waits for {event.at}")
        return event

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.on = self.on, stream.name
        yield
        self.on = before


def test_an_accelerator_has_two_streams_beside_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to see that copies are asked of them, in both directions."""
    streams, ways = Streams(), set[tuple[str, bool]]()
    copy = torch.Tensor.copy_

    def noted(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        ways.add((streams.on, non_blocking))
        return copy(self, source)

    monkeypatch.setattr(devices, "HOST_MEMORY", frozenset())
    monkeypatch.setattr(queues, "queued", lambda device: True)
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    params, optimizer = make("GaLoreAdamW", **HOST)
    runs.set_grads(params, 0)
    optimizer.step()
    monkeypatch.setattr(Tensor, "copy_", noted)
    runs.set_grads(params, 1)
    optimizer.step()
    monkeypatch.undo()
    assert {way for way in ways if way[1]} == {("stream 0", True), ("stream 1", True)}
    waits = {call for call in streams.calls if "waits" in call}
    assert waits >= {
        "current waits for stream 0",
        "stream 1 waits for current",
        "stream 0 waits for stream 1",
        "the host waits for stream 1",
    }
    plain = make("GaLoreAdamW")
    runs.train(*plain, range(2))
    runs.assert_same(params, plain[0])
