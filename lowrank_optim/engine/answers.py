"""Whether refreshes came about: an accelerator says so, and its host asks a step later.

A host that asked at once would wait until its device had done all that was queued. The device
selects by itself what a refresh that did not come about leaves as it was; the host takes it for
done, starts a copy of the answer, and reads it when it next asks whether the basis is due. Until
then the device was given a whole forward and backward, so that it has work while the host waits
for the answer, if it must. Where the basis is due anyway nobody asks.
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

logger = logging.getLogger(__name__)

State = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Answer:
    """What is known of the refreshes of a matrix since the host last asked."""

    name: str
    """Of the parameter."""
    good: Tensor
    """How many came about, on the device."""
    count: int
    """How many there were."""
    last: int
    """Where the last one before them was, -1 for none."""
    told: Tensor | None
    """A copy of ``good`` on its way to the host."""
    arrived: Any
    """The event after which it is there; None where there is no queue."""
    before: Mapping[str, float]
    """What numbers of the host were that refreshes advanced."""

    def read(self) -> int:
        """How many did not come about; waits until the device is there."""
        if self.told is None:
            return self.count - int(self.good)
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.count - int(self.told)


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
    state: State, name: str, ok: Tensor, last: int, soon: bool, before: Mapping[str, float]
) -> Searching[None]:
    """Note that the device knows whether a refresh came about.

    Args:
        state: of the matrix.
        name: likewise.
        ok: 0-d bool on the device.
        last: ``refresh_step`` before it.
        soon: whether the next step asks, so that the answer is to be on its way.
        before: numbers of the host in the state, as they were before it.
    """
    if fake_mode() is not None or ok.is_meta:
        return  # of a healthy run, in which all come about
    older = of(state)
    good = yield Ask(_counted, (ok,)) if older is None else Ask(torch.add, (older.good, ok))
    count, last = (1, last) if older is None else (older.count + 1, older.last)
    told, arrived = _on_its_way(good) if soon else (None, None)
    _open[state["refresh_step"]] = Answer(name, good, count, last, told, arrived, before)


def _counted(ok: Tensor) -> Tensor:
    return ok.to(torch.int32)


def _on_its_way(good: Tensor) -> tuple[Tensor | None, Any]:
    pinned = queued(good.device)
    if not pinned and not good.is_cpu:
        return None, None  # such a copy would not say when it is there
    told = torch.empty((), dtype=torch.int32, pin_memory=pinned)
    told.copy_(good, non_blocking=True)
    if not pinned:
        return told, None
    module = torch.get_device_module(good.device)
    arrived = module.Event()
    arrived.record(module.current_stream(good.device))
    return told, arrived


def settle_(state: State) -> None:
    """Ask, and count what was postponed; a single refresh that was is due again."""
    answer = of(state)
    if answer is None:
        return
    failed, _ = answer.read(), _open.pop(state["refresh_step"])
    if not failed:
        return
    state["postponed"] += failed
    if answer.count == 1:
        state["refresh_step"].fill_(answer.last)
        for key, count in answer.before.items():
            state[key].fill_(count)
    logger.info(
        "refresh of %s postponed %d time(s): its gradient was zero or not finite, or could not be "
        "factored",
        answer.name,
        failed,
    )
