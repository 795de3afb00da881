"""A device whose queues may run in any order that nothing forbids: every race is found.

Copies are made when they are asked for, and what may be relied upon is kept beside them as vector
clocks: a queue knows of the work of another what it has waited for. Two uses of the same memory of
which one writes must be in an order that is known, or they are a race, whatever the order was here.
While something stands in for a tensor of the host, that one holds nothing that could be used, and
no op of a step but a copy may meet it at any time: on an accelerator it would be elsewhere.

    with Device() as device:
        optimizer.step()
        device.host(x)   # the host reads a tensor of its own
    device.races         # what was not in order, or met what is elsewhere
    device.waits         # places of the package that wait, each of which can be left out
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_optim
from lowrank_optim import LowRankOptimizer
from lowrank_optim.engine import offload
from lowrank_optim.ops import devices, queues
from lowrank_optim.sharding.parts import local

PACKAGE = str(Path(lowrank_optim.__file__).parent)

COPIES = {
    "copy_", "_foreach_copy_", "clone", "detach", "empty_like", "_to_copy", "fill_", "zero_",
    "new_empty", "alias",
}  # fmt: skip
"""Ops that may read or write what another device holds, or do neither."""

Clock = Counter[str]


class Use(NamedTuple):
    """One use of memory."""

    start: int
    stop: int
    who: str
    time: int
    writes: bool
    where: str


class Device:
    """The CPU as an accelerator with memory and queues of its own.

    Args:
        without: a place that waits, and is to be left out.
        lazy: whether steps decide nothing by values, as on an accelerator.
    """

    def __init__(self, without: str | None = None, lazy: bool = False) -> None:
        self.races: list[str] = []
        self.waits: Counter[str] = Counter()
        self.copies = self.stalls = 0
        """Copies between the host and the device; how often the host waited for all queues."""
        self._without, self._lazy = without, lazy
        self._clocks: dict[str, Clock] = {"host": Counter(), "current": Counter()}
        self._uses: list[Use] = []
        self._hosts: set[int] = set()
        self._within = 0
        self._mode = _Ops(self)
        self._alive: list[Any] = []  # or its memory would be that of others later
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        self._patch.setattr(devices, "HOST_MEMORY", frozenset())
        if self._lazy:
            self._patch.setattr(devices, "HOSTS", frozenset())
        self._patch.setattr(queues, "beside", lambda device: _Queue(self, self._new()))
        self._patch.setattr(queues, "current", lambda device: _Queue(self, "current"))
        self._patch.setattr(queues, "finish", self._finish)
        stand_in, put_back = offload.Entry.stand_in, offload.Entry.put_back

        hidden: dict[int, Tensor] = {}

        def begins(entry: offload.Entry, x: Tensor) -> None:
            stand_in(entry, x)
            self.use("current", x, True)
            self._hosts.add(entry.host.untyped_storage().data_ptr())
            self._alive.append(entry.host)
            hidden[id(entry.kept)] = entry.host.clone()
            entry.host.view(-1).view(torch.uint8).fill_(255)  # NaN, or the largest code

        def ends(entry: offload.Entry) -> None:
            self.use("current", local(entry.held[entry.key]), True)
            put_back(entry)
            entry.host.copy_(hidden.pop(id(entry.kept)))

        self._patch.setattr(offload.Entry, "stand_in", begins)
        self._patch.setattr(offload.Entry, "put_back", ends)
        for name in ("_step_eagerly", "_step_alone", "_step_shards"):
            self._patch.setattr(
                LowRankOptimizer, name, self._inside(getattr(LowRankOptimizer, name))
            )
        self._mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._mode.__exit__(*raised)
        self._patch.undo()

    def _inside(self, call: Any) -> Any:
        @functools.wraps(call)
        def within(*args: Any, **kwargs: Any) -> Any:
            self._within += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._within -= 1

        return within

    def forget(self) -> None:
        """What was the host's may be the device's from now on: the CPU moves nothing."""
        self._hosts.clear()

    def met(self, func: Any, args: Any, kwargs: Any) -> None:
        """An op of a step, which may not meet tensors of the host."""
        if not self._within or func.is_view or func._opname in COPIES:
            return
        given = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor]
        if any(x.untyped_storage().data_ptr() in self._hosts for x in given):
            self.races.append(f"{func} at {_place()} meets a tensor of the host")

    def _new(self) -> str:
        name = f"queue {len(self._clocks) - 1}"
        self._clocks[name] = Counter()
        return name

    def _finish(self, device: torch.device) -> None:
        self.stalls += 1
        if self.left_out():
            return
        for clock in list(self._clocks.values()):
            self._clocks["host"] |= clock

    def host(self, x: Tensor, writes: bool = False) -> None:
        """The host reads a tensor, or writes it."""
        self.use("host", local(x), writes)

    def use(self, who: str, x: Tensor, writes: bool) -> None:
        """Somebody does, after all that it knows of."""
        self.asked(who)
        self._alive.append(x)
        start = x.untyped_storage().data_ptr() + x.storage_offset() * x.itemsize
        clock, mine = self._clocks[who], Use(start, start + x.nbytes, who, 0, writes, _place())
        clock[who] += 1
        mine = mine._replace(time=clock[who])
        left = []
        for other in self._uses:
            overlap = other.start < mine.stop and mine.start < other.stop
            known = clock[other.who] >= other.time
            if overlap and (other.writes or writes) and not known:
                self.races.append(f"{who} at {mine.where} and {other.who} at {other.where}")
            inside = mine.start <= other.start and other.stop <= mine.stop
            if not (writes and known and inside):  # or who is after this is after that
                left.append(other)
        self._uses = [*left, mine]

    def asked(self, who: str) -> None:
        """What is asked of a queue is so after all that the host knows."""
        self._clocks[who] |= self._clocks["host"]

    def left_out(self) -> bool:
        """Whether the wait that is being asked for is the one to be left out."""
        place = _place()
        self.waits[place] += 1
        return place == self._without


class _Queue:
    def __init__(self, device: Device, name: str) -> None:
        self._device, self._name = device, name

    def copy_(self, into: Tensor, source: Tensor) -> None:
        self._device.use(self._name, source, False)
        self._device.use(self._name, into, True)
        self._device.copies += 1
        into.copy_(source)

    def record(self) -> _Mark:
        self._device.asked(self._name)
        return _Mark(self._device, Counter(self._device._clocks[self._name]))

    def wait(self, mark: _Mark) -> None:
        if not self._device.left_out():
            self._device._clocks[self._name] |= mark.clock

    def keep(self, x: Tensor) -> None:
        self._device._alive.append(x)


class _Mark:
    def __init__(self, device: Device, clock: Clock) -> None:
        self._device, self.clock = device, clock

    def synchronize(self) -> None:
        if not self._device.left_out():
            self._device._clocks["host"] |= self.clock


class _Ops(TorchDispatchMode):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self._device.met(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of the package."""
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "the test"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
