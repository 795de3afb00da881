"""Tensors averaged over the ranks of a group: many in few messages, sent once they are full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_optim.sharding import collectives
from lowrank_optim.sharding.collectives import Form

BUCKET_BYTES = 25 << 20
"""A message takes no further tensor once it has as much: DistributedDataParallel's default."""

HINT = (
    "gradients are averaged with the other ranks at the end of backward(): every rank must call "
    "backward() as often as the others, and use no_sync() around the same calls"
)


@dataclass(eq=False)
class _Bucket:
    """One message: tensors one after the other, then a number for each that tells who has it."""

    dtype: torch.dtype
    device: torch.device
    members: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    size: int = 0
    """Elements of all tensors."""
    filled: int = 0
    buffer: Tensor | None = None
    work: Any = None

    @property
    def full(self) -> bool:
        """Whether nothing is missing."""
        return self.filled == len(self.members)

    def place(self, slot: int, shape: Sequence[int]) -> Tensor:
        """Where a member is, or will be."""
        if self.buffer is None:
            size = self.size + len(self.members)
            self.buffer = torch.empty(size, dtype=self.dtype, device=self.device)
        start = self.starts[slot]
        return self.buffer[start : start + math.prod(shape)].view(shape)

    def flag(self, slot: int) -> Tensor:
        """1 if this rank has a member; once it has arrived, the fraction of ranks that have."""
        assert self.buffer is not None
        return self.buffer[self.size + slot]


class Averages:
    """Tensors of which each rank hands over its own, in any order, and gets the mean.

    Messages leave in one order on every rank, each as soon as it is full and those before it have
    left. A rank that has none of a tensor takes part with zeros.

    Args:
        forms: of all tensors and where they are, the same on every rank, in the order in which they
            are expected.
        group: the ranks.
        ready: called with the numbers of the tensors of a message that has arrived, once the next
            one has left; and of the last by :meth:`finish`. None waits for none before that.
    """

    def __init__(
        self,
        forms: Sequence[tuple[Form, torch.device]],
        group: dist.ProcessGroup,
        ready: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        self._group, self._ready = group, ready
        self._shapes = [form.shape for form, _ in forms]
        self._of: list[tuple[_Bucket, int]] = []
        """The message of each tensor, and its place among the members."""
        self._buckets: list[_Bucket] = []
        """In the order of the last tensor of each."""
        self._sent = self._arrived = 0
        open_: dict[tuple[torch.dtype, torch.device], _Bucket] = {}
        for n, (form, device) in enumerate(forms):
            key = form.dtype, device
            bucket = open_.setdefault(key, _Bucket(*key))
            self._of.append((bucket, len(bucket.members)))
            bucket.members.append(n)
            bucket.starts.append(bucket.size)
            bucket.size += math.prod(form.shape)
            if bucket.size * form.dtype.itemsize >= BUCKET_BYTES:
                self._buckets.append(open_.pop(key))
        self._buckets += sorted(open_.values(), key=lambda b: b.members[-1])

    def put(self, n: int, x: Tensor | None) -> Tensor:
        """Hand over a tensor, None if this rank has none; returns where its mean will be."""
        bucket, slot = self._of[n]
        place = bucket.place(slot, self._shapes[n])
        place.zero_() if x is None else place.copy_(x)
        bucket.flag(slot).fill_(0 if x is None else 1)
        bucket.filled += 1
        return place

    def send(self) -> None:
        """Let all that is full leave, if it is its turn."""
        while self._sent < len(self._buckets) and self._buckets[self._sent].full:
            bucket = self._buckets[self._sent]
            assert bucket.buffer is not None
            self._sent += 1
            bucket.work = self._told(partial(collectives.average_, bucket.buffer, self._group))
            if self._ready is not None and self._sent > 1:
                self._receive()

    def finish(self) -> None:
        """Wait for all; each must have been handed over."""
        self.send()
        assert self._sent == len(self._buckets)
        while self._arrived < self._sent:
            self._receive()

    def anyone_has(self, n: int) -> bool:
        """Whether some rank had a tensor that has arrived: a device waits for the answer."""
        bucket, slot = self._of[n]
        return bool(bucket.flag(slot) > 0)

    def _receive(self) -> None:
        bucket = self._buckets[self._arrived]
        self._arrived += 1
        self._told(bucket.work.wait)
        if self._ready is not None:
            self._ready(bucket.members)

    def _told(self, message: Callable[[], Any]) -> Any:
        try:
            return message()
        except RuntimeError as error:
            error.add_note(HINT)
            raise
