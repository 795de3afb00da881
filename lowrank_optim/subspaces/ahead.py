"""Candidates that come next, copied to the device before they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from lowrank_optim.ops import queues
from lowrank_optim.ops.queues import Queue
from lowrank_optim.subspaces.switching import runs
from lowrank_optim.tensors.matrix import shares_memory


def apart(pool: Tensor, factor: Tensor) -> bool:
    """Whether the device copies from pinned host memory while it computes: CUDA does.

    Not where something lies between rows, as what fills up a block of another process's form: the
    host would copy them together first, and read what is still on its way to the pool.
    """
    return factor.is_cuda and not pool.is_cuda and pool.is_contiguous()


class Staged(NamedTuple):
    """Rows of a pool on the device, as they were at one version of it."""

    pool: Tensor
    version: int
    entries: list[int]
    rows: Tensor
    """``(..., count, size)``."""


class Ahead:
    """The next candidates of one matrix, for A (0) and for B (1), on a stream of their own.

    What is staged counts only while nothing was written to its pool since: after a checkpoint is
    loaded, or a pool is changed by hand, the candidates come straight from the pool.
    """

    def __init__(self) -> None:
        self._staged: dict[int, Staged] = {}
        self._queue: Queue | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """All that is held on the device."""
        return (staged.rows for staged in self._staged.values())

    def stage(self, side: int, pool: Tensor, entries: Sequence[int], like: Tensor) -> None:
        """Begin to copy ``entries`` of a pool, after all that was sent to it."""
        held, entries = self._staged.get(side), list(entries)
        if not entries or self._find(side, pool, entries) is not None:
            return
        shape = *pool.shape[:-2], len(entries), pool.shape[-1]
        rows = held.rows if held is not None and held.rows.shape == shape else like.new_empty(shape)
        self._queue = self._queue or queues.beside(rows.device)
        self._queue.wait(queues.current(rows.device).record())
        self._queue.keep(rows)
        for at, entry in runs(range(len(entries)), entries):
            self._queue.copy_(rows[..., at, :], pool[..., entry, :])
        self._staged[side] = Staged(pool, pool._version, entries, rows)

    def take(self, side: int, pool: Tensor, entries: Sequence[int]) -> Tensor | None:
        """``entries`` of a pool ``(..., count, size)``, or None if others are staged."""
        rows = self._find(side, pool, entries)
        if rows is not None and self._queue is not None:
            queues.current(rows.device).wait(self._queue.record())
        return rows

    def _find(self, side: int, pool: Tensor, entries: Sequence[int]) -> Tensor | None:
        held, count = self._staged.get(side), len(entries)
        # a rank sees its part of a pool by a new view in every step, of the same version
        if held is None or not _same(held.pool, pool) or held.version != pool._version:
            return None
        return held.rows[..., :count, :] if held.entries[:count] == list(entries) else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    place = a.storage_offset(), a.shape, a.stride()
    return shares_memory(a, b) and place == (b.storage_offset(), b.shape, b.stride())
