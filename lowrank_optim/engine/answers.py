"""Whether refreshes came about: an accelerator says so, and its host asks a step later.

A host that asked at once would wait until its device had done all that was queued. The device
selects by itself what a refresh that did not come about leaves as it was; the host takes it for
done, starts a copy of the answer, and reads it when it next asks whether the basis is due. Until
then the device was given a whole forward and backward, so that it has work while the host waits
for the answer, if it must. Where the basis is due anyway nobody asks, unless refreshes are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lowrank_optim.engine.tracing import fake_mode
from lowrank_optim.ops.devices import queued
from lowrank_optim.subspaces.searches import Ask, Searching
from lowrank_optim.tensors.state import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Told:
    """What a device says, and a copy of it on its way to the host."""

    there: Tensor
    here: Tensor | None
    """None where a copy could not say when it has arrived."""
    arrived: Any
    """The event after which it is there; None where there is no queue."""

    def read(self) -> Tensor:
        """It, on the host; waits until the device is there."""
        if self.here is None:
            return self.there.cpu()
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.here


@dataclass(frozen=True)
class Answer:
    """What is known of the refreshes of a matrix since the host last asked."""

    name: str
    """Of the parameter."""
    good: Tensor
    """How many came about, on the device."""
    count: int
    """How many there were."""
    last: int | None
    """Where the last one before them was, -1 for none; None if that is not to be put back."""
    told: Told | None
    """``good`` on its way to the host."""
    before: Mapping[str, float]
    """What numbers of the host were that refreshes advanced."""

    def read(self) -> int:
        """How many did not come about; waits until the device is there."""
        return self.count - int(self.good if self.told is None else self.told.read())


_open: MutableMapping[Tensor, Answer] = WeakTensorKeyDictionary()
"""Answers that nobody has read, by the ``refresh_step`` of a state."""


def of(state: State) -> Answer | None:
    """What has not been asked of a matrix."""
    if not _open:
        return None
    key = state.get("refresh_step")
    return None if key is None else _open.get(key)


def put_back(state: State, answer: Answer | None) -> None:
    """As it was before a step that raised."""
    key = state.get("refresh_step")
    if key is not None:
        _open.pop(key, None)
        if answer is not None:
            _open[key] = answer


def expecting_(
    state: State,
    name: str,
    ok: Tensor,
    last: int | None,
    soon: bool,
    before: Mapping[str, float],
) -> Searching[None]:
    """Note that the device knows whether a refresh came about.

    Args:
        state: of the matrix.
        name: likewise.
        ok: 0-d bool on the device.
        last: ``refresh_step`` before it; None if that is not to be put back.
        soon: whether the next step asks, so that the answer is to be on its way.
        before: numbers of the host in the state, as they were before it.
    """
    if fake_mode() is not None or ok.is_meta:
        return  # of a healthy run, in which all come about
    older = of(state)
    good = yield Ask(_counted, (ok,)) if older is None else Ask(torch.add, (older.good, ok))
    count, last = (1, last) if older is None else (older.count + 1, older.last)
    told = on_its_way(good) if soon else None
    _open[state["refresh_step"]] = Answer(name, good, count, last, told, before)


def _counted(ok: Tensor) -> Tensor:
    return ok.to(torch.int32)


def on_its_way(x: Tensor) -> Told:
    """Begin to copy what a device knows to its host, which does not wait for it."""
    pinned = queued(x.device)
    if not pinned and not x.is_cpu:
        return Told(x, None, None)
    here = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
    here.copy_(x, non_blocking=True)
    if not pinned:
        return Told(x, here, None)
    module = torch.get_device_module(x.device)
    arrived = module.Event()
    arrived.record(module.current_stream(x.device))
    return Told(x, here, arrived)


def settle_(state: State) -> None:
    """Ask, and count what was postponed; a single refresh that was is due again."""
    answer = of(state)
    if answer is None:
        return
    failed, _ = answer.read(), _open.pop(state["refresh_step"])
    if not failed:
        return
    state["postponed"] += failed
    if answer.count == 1 and answer.last is not None:
        state["refresh_step"].fill_(answer.last)
        for key, count in answer.before.items():
            state[key].fill_(count)
    logger.info(
        "refresh of %s postponed %d time(s): its gradient was zero or not finite, or could not be "
        "factored",
        answer.name,
        failed,
    )
