"""Queues of a device: copies that go on beside its computations, and what waits for what."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_optim.ops.devices import queued


class Mark(Protocol):
    """A place in a queue: reached once all that was asked before it is done."""

    def synchronize(self) -> None:
        """Let the host wait for it."""
        ...


class Queue(Protocol):
    """Work that is done in the order in which it was asked for, at any time."""

    def copy_(self, into: Tensor, source: Tensor) -> None:
        """Copy, once all that was asked before is done."""
        ...

    def record(self) -> Mark:
        """The place after all that was asked so far."""
        ...

    def wait(self, mark: Mark) -> None:
        """Begin nothing that is asked from now on before a place in another queue is reached."""
        ...

    def keep(self, x: Tensor) -> None:
        """Memory of ``x`` is not given to others before what is asked of it here is done."""
        ...


class AtOnce:
    """Of a device whose work is done when it is asked for."""

    def copy_(self, into: Tensor, source: Tensor) -> None:
        """Now."""
        into.copy_(source)

    def record(self) -> Mark:
        """Reached already."""
        return self

    def wait(self, mark: Mark) -> None:
        """There is nothing to wait for."""

    def keep(self, x: Tensor) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Likewise."""


class Streamed:
    """A stream of an accelerator; without one of its own, the one that is current."""

    def __init__(self, device: torch.device, own: bool) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._own: Any = self._module.Stream(device) if own else None

    @property
    def _stream(self) -> Any:
        if self._own is not None:
            return self._own
        return self._module.current_stream(self._device)

    def copy_(self, into: Tensor, source: Tensor) -> None:
        """From or to pinned memory: the host goes on."""
        on: AbstractContextManager[Any] = nullcontext()
        if self._own is not None:
            on = self._module.stream(self._own)
        with on:
            into.copy_(source, non_blocking=True)

    def record(self) -> Mark:
        """An event."""
        event: Mark = self._module.Event()
        event.record(self._stream)  # type: ignore[attr-defined]
        return event

    def wait(self, mark: Mark) -> None:
        """The device waits, not the host."""
        self._stream.wait_event(mark)

    def keep(self, x: Tensor) -> None:
        """The allocator is told."""
        x.record_stream(self._stream)


def beside(device: torch.device) -> Queue:
    """A new queue beside that of a device's computations."""
    return Streamed(device, own=True) if queued(device) else AtOnce()


def current(device: torch.device) -> Queue:
    """The queue of its computations."""
    return Streamed(device, own=False) if queued(device) else AtOnce()


def finish(device: torch.device) -> None:
    """Let the host wait until all queues of a device are done."""
    if queued(device):
        torch.get_device_module(device).synchronize(device)
