"""State that lies in host memory between steps: on the device while a bucket needs it.

Two buffers on the device take turns. While one bucket is stepped in the first, what the next one
needs is on its way into the second, and what the one before has left there is on its way back:

    ============= ======================= ======================= =======================
    queue         bucket 1                bucket 2                bucket 3
    ============= ======================= ======================= =======================
    in            into buffer A           into buffer B           into A, once 1 is back
    computations  once 1 is there         once 2 is there         once 3 is there
    out           back, once 1 is stepped back, once 2 is stepped back, once 3 is stepped
    ============= ======================= ======================= =======================

The tensors of a state are those of the host. While a bucket is stepped those on the device stand
in their place, so that rules, stores and transports meet no other device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_optim.engine.plan import ParamPlan, State, Strategies
from lowrank_optim.engine.sharded.local import as_dtensor
from lowrank_optim.engine.state import moving_keys, resting_keys
from lowrank_optim.engine.undo import Undo
from lowrank_optim.ops import queues
from lowrank_optim.ops.devices import pinned
from lowrank_optim.ops.queues import Mark, Queue
from lowrank_optim.sharding.parts import is_sharded, local

ALIGN = 256
"""Bytes: where entries begin in a buffer."""


class Entry(NamedTuple):
    """One entry of a state that rests."""

    number: int
    """Of its state among those of the bucket."""
    held: dict[str, Tensor]
    """The entries of the optimizer, of which this is one."""
    key: str
    kept: Tensor
    """What is there between steps."""

    @property
    def host(self) -> Tensor:
        """The part that is here, as it is stored."""
        return local(self.kept)

    def stand_in(self, x: Tensor) -> None:
        """Let a tensor of the device take its place."""
        whole: Any = self.kept
        if is_sharded(whole):
            x = as_dtensor(x, whole.device_mesh, tuple(whole.placements), whole.shape)
        self.held[self.key] = x

    def put_back(self) -> None:
        """Let it have its place again."""
        self.held[self.key] = self.kept


class Load(NamedTuple):
    """What a bucket needs on the device."""

    states: Sequence[State]
    entries: Sequence[Entry]
    device: torch.device

    @property
    def nbytes(self) -> int:
        """What it takes of a buffer."""
        return sum(padded(entry.host.nbytes) for entry in self.entries)


def padded(size: int) -> int:
    """Bytes of a buffer that an entry of ``size`` bytes takes."""
    return -(-size // ALIGN) * ALIGN


def load_of(
    items: Sequence[ParamPlan],
    states: Sequence[State],
    chosen: Strategies,
    keys: Sequence[str] | None = None,
) -> Load:
    """What rests of the state of some parameters; of that, what is under ``keys``."""
    entries = [
        Entry(n, held, key, held[key])
        for n, (item, state) in enumerate(zip(items, states, strict=True))
        for held in [_outer(state)]
        for key in resting_keys(item, chosen)
        if key in held and (keys is None or key in keys)
    ]
    return Load(states, entries, local(items[0].param).device)


def together(loads: Sequence[Load]) -> Load:
    """Several as one."""
    states = [state for load in loads for state in load.states]
    entries, first = list[Entry](), 0
    for load in loads:
        entries += [entry._replace(number=first + entry.number) for entry in load.entries]
        first += len(load.states)
    return Load(states, entries, loads[0].device)


def _outer(state: State) -> dict[str, Tensor]:
    """The dict behind what a rank sees of a state."""
    found: Any = getattr(state, "outer", state)
    held: dict[str, Tensor] = found
    return held


@dataclass(eq=False)
class _Buffer:
    memory: Tensor
    free: Mark
    """Where what was in it is back on the host."""


@dataclass(eq=False)
class _Fetched:
    """A load in a buffer, or on its way there."""

    load: Load
    buffer: _Buffer
    there: Mark
    parts: Sequence[Tensor]
    """Of the buffer: each entry, as it is stored."""


@dataclass(eq=False)
class _Lane:
    """The buffers of one device, and its queues."""

    into: Queue
    back: Queue
    current: Queue
    size: int = 0
    """Of each buffer: the largest load so far."""
    buffers: list[_Buffer] = field(default_factory=list)
    under_way: dict[int, tuple[Tensor, Mark]] = field(default_factory=dict)
    """Tensors of the host that are being written, by id, and until when."""
    last: Mark | None = None
    """Where the last copy from the host ends."""

    @classmethod
    def of(cls, device: torch.device) -> _Lane:
        """With no buffers yet."""
        return cls(queues.beside(device), queues.beside(device), queues.current(device))

    def taken(self, size: int, device: torch.device) -> _Buffer:
        """The buffer whose turn it is, at least so large."""
        self.size = max(self.size, size)
        buffer = self.buffers.pop(0) if len(self.buffers) > 1 else None
        if buffer is None or buffer.memory.numel() < self.size:
            memory = torch.empty(self.size, dtype=torch.uint8, device=device)
            for queue in (self.into, self.back):
                queue.keep(memory)
            # whoever had this memory before had it for computations
            buffer = _Buffer(memory, self.current.record())
        self.buffers.append(buffer)
        return buffer


class Staging:
    """What an optimizer's buckets pass through where their state rests on the host."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, _Lane] = {}

    @property
    def nbytes(self) -> int:
        """What the buffers take, on all devices."""
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The buffers."""
        return [buffer.memory for lane in self._lanes.values() for buffer in lane.buffers]

    def each(self, loads: Sequence[Load], call: Callable[[int], None], undo: Undo) -> None:
        """Call ``call(n)`` for each load, in order, with its entries on the device.

        The host does not wait for what goes back: :meth:`wait` does. If a call raises, what it has
        not done goes nowhere: the host has it as it was.

        Args:
            loads: what each call needs.
            call: steps one.
            undo: knows which states have taken their step.
        """
        coming = self._fetch(loads[0]) if loads else None
        for n, load in enumerate(loads):
            now = coming
            coming = self._fetch(loads[n + 1]) if n + 1 < len(loads) else None
            if now is None:
                call(n)
                continue
            for state in load.states:  # as it rests
                undo.begin(state)
            self._staged(now, n, call, undo)

    def wait(self) -> None:
        """Let the host wait until all that rests is there."""
        for lane in self._lanes.values():
            for _, mark in lane.under_way.values():
                mark.synchronize()
            lane.under_way.clear()
            if lane.last is not None:
                lane.last.synchronize()

    def _fetch(self, load: Load) -> _Fetched | None:
        """Begin to copy a load into the buffer whose turn it is."""
        if not load.entries:
            return None
        if load.device not in self._lanes:
            self._lanes[load.device] = _Lane.of(load.device)
        lane = self._lanes[load.device]
        buffer = lane.taken(load.nbytes, load.device)
        lane.into.wait(buffer.free)
        parts, start = [], 0
        for entry in load.entries:
            host = entry.host
            part = buffer.memory[start : start + host.nbytes].view(host.dtype).view(host.shape)
            start += padded(host.nbytes)
            writing = lane.under_way.get(id(entry.kept))
            if writing is not None:
                lane.into.wait(writing[1])
            lane.into.copy_(part, host)
            parts.append(part)
        lane.last = lane.into.record()
        return _Fetched(load, buffer, lane.last, parts)

    def _staged(self, fetched: _Fetched, n: int, call: Callable[[int], None], undo: Undo) -> None:
        """Step a load in its buffer; what was stepped of it begins to go back."""
        load, lane = fetched.load, self._lanes[fetched.load.device]
        lane.current.wait(fetched.there)
        pairs = list(zip(load.entries, fetched.parts, strict=True))
        try:
            for entry, part in pairs:
                entry.stand_in(part)
            call(n)
        except BaseException:
            done = [not undo.holds(state) for state in load.states]
            pairs = [(entry, part) for entry, part in pairs if done[entry.number]]
            raise
        finally:
            for entry in load.entries:
                entry.put_back()
            lane.back.wait(lane.current.record())
            for entry, part in pairs:
                lane.back.copy_(entry.host, part)
            fetched.buffer.free = mark = lane.back.record()
            lane.under_way.update({id(entry.kept): (entry.kept, mark) for entry, _ in pairs})


@contextmanager
def on_device(
    item: ParamPlan, state: State, chosen: Strategies, keys: Sequence[str] | None = None
) -> Iterator[None]:
    """What rests of a state, on the device for a while, outside of a bucket's step.

    Of refreshes that are no part of one: the host waits.

    Args:
        item: the parameter.
        state: its state.
        chosen: what its group chose.
        keys: what is needed (default: all that rests).
    """
    load = load_of([item], [state], chosen, keys)
    if not load.entries:
        yield
        return
    queues.finish(load.device)  # what a bucket left may be on its way back
    queue = queues.current(load.device)
    parts = [torch.empty_like(entry.host, device=load.device) for entry in load.entries]
    pairs = list(zip(load.entries, parts, strict=True))
    try:
        for entry, part in pairs:
            queue.copy_(part, entry.host)
            entry.stand_in(part)
        yield
    finally:
        for entry, part in pairs:
            entry.put_back()
            queue.copy_(entry.host, part)
        queue.record().synchronize()


def settle_(state: Mapping[str, Tensor], item: ParamPlan, chosen: Strategies) -> None:
    """Let the entries of a state lie where its group wants them, after that was edited."""
    held: Any = state
    device = local(item.param).device
    rests = set(resting_keys(item, chosen))
    for key in moving_keys(item, chosen):
        if key in held:
            x = local(held[key])
            moved = pinned(x.cpu(), device) if key in rests else x.to(device)
            if moved is not x:
                Entry(0, held, key, held[key]).stand_in(moved)
