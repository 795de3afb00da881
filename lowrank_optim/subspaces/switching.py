"""When SwitchLoRA switches, and which vectors: arithmetic on counters, all of it on the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 0.3
"""What the frequency has fallen to after ``descent_ratio`` of the run."""


@dataclass(frozen=True)
class Schedule:
    r"""How many of r vectors a step switches: :math:`E[q] = r\, \rho(t) / interval`.

    ============= ===============================================================
    exponential   :math:`\rho(t) = \max(0.3^{(t + 1) / T_d}, 10^{-8})`
    Z             :math:`\rho(t) = 1 - \mathrm{sigmoid}(10 (t - T_d) / T_d)`
    constant      :math:`\rho(t) = 1`, where ``total_steps`` is None
    ============= ===============================================================

    with t counted from 0 and :math:`T_d` = ``descent_ratio`` times ``total_steps``.
    """

    interval: int = 40
    total_steps: int | None = None
    descent_ratio: float = 0.1
    descent: str = "exponential"

    def rate(self, step: int) -> float:
        """ρ at ``step``, counted from 0."""
        if self.total_steps is None:
            return 1.0
        decay = self.descent_ratio * self.total_steps
        if self.descent == "Z":
            return 1 - 1 / (1 + math.exp(-min(10 * (step - decay) / decay, 700.0)))
        return max(math.pow(FLOOR, (step + 1) / decay), 1e-8)

    def most(self, step: int, rank: int) -> int:
        """The largest q that :meth:`count` may draw."""
        return math.ceil(rank * self.rate(step) / self.interval)

    def count(self, step: int, rank: int, generator: torch.Generator) -> int:
        """q, its expectation rounded up with the probability of its fraction."""
        whole, part = divmod(rank * self.rate(step) / self.interval, 1.0)
        return int(whole) + (float(torch.rand((), generator=generator, dtype=torch.float64)) < part)


def ring(start: int, count: int, size: int) -> list[int]:
    """``count`` consecutive positions of a ring."""
    return [(start + i) % size for i in range(count)]


def runs(*columns: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices over stretches where every column counts up by one.

    A copy between slices needs no index tensor, so neither the host nor the device waits.
    """
    start, length = 0, len(columns[0])
    for i in range(1, length + 1):
        if i == length or any(c[i] != c[i - 1] + 1 for c in columns):
            yield tuple(slice(c[start], c[start] + i - start) for c in columns)
            start = i


def slices(slots: Iterable[int]) -> list[slice]:
    """Over all of some slots, in their order."""
    ordered = sorted(slots)
    return [own for (own,) in runs(ordered)] if ordered else []


def free_slots(rank: int, size: int, frozen: Sequence[int]) -> int:
    """The most slots that a side may switch now.

    The ring of A's slots and that of B's stay ``rank // 2`` apart. Behind each are the slots whose
    counterpart was switched last and which are frozen; a window must reach neither them nor the
    other window, and the vectors that come in must not be in use.

    Args:
        rank: r.
        size: k, the entries of a pool.
        frozen: how many of A's rows and of B's columns are frozen.
    """
    gap = rank // 2
    return max(0, min(gap - frozen[0], rank - gap - frozen[1], size - rank))


def start_held(rank: int, size: int) -> Tensor:
    """``(2, r)`` pool indices first in use by A and by B: the last r, B's turned by ``r // 2``."""
    last = torch.arange(size - rank, size)
    return torch.stack([last, last.roll(rank // 2)])


def check_rings(held: Sequence[Sequence[int]], heads: Sequence[int], size: int, fifo: bool) -> None:
    """Raise unless :func:`free_slots` and :func:`incoming` may rely on a saved state.

    Args:
        held: pool indices in use by A and by B.
        heads: the next slot of each.
        size: entries of a pool.
        fifo: whether candidates come in turn.

    Raises:
        ValueError: the rings of A and B are not half of them apart, or a ring is out of turn.
    """
    rank = len(held[0])
    if heads[1] != (heads[0] + rank // 2) % rank:
        raise ValueError(
            f"host.head holds {list(heads)}; allowed are slots {rank // 2} apart, of {rank}"
        )
    for own, head in zip(held, heads, strict=True) if fifo else ():
        for slot, entry in zip(ring(head, rank, rank), ring(own[head], rank, size), strict=True):
            if own[slot] != entry:
                raise ValueError(
                    f"host.held holds {own[slot]} in slot {slot}; allowed is {entry}, as "
                    "entries of a pool come in turn (order='fifo') from slot host.head = "
                    f"{head}, which holds {own[head]}"
                )


def incoming(
    held: Sequence[int], head: int, count: int, size: int, generator: torch.Generator | None
) -> list[int]:
    """Pool indices that come in: the next of the ring, or any not in use if there is a generator.

    The youngest of a ring is in the slot before ``head``; those in use are the r up to it, so the
    next ``count <= size - r`` are free.
    """
    if generator is None:
        return ring(held[head - 1] + 1, count, size)
    idle = sorted(set(range(size)) - set(held))
    order = torch.randperm(len(idle), generator=generator)
    return [idle[i] for i in order[:count].tolist()]


def where(frozen: Sequence[int]) -> list[slice]:
    """Slices over the frozen slots."""
    return slices(i for i, n in enumerate(frozen) if n)


def thawing(frozen: Sequence[int]) -> set[int]:
    """Slots whose last frozen step is over: their step counts from here."""
    return {i for i, n in enumerate(frozen) if n == 1}
