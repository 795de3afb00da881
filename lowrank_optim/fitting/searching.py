"""Which way to train, and which ranks, a budget has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NoReturn

from lowrank_optim.fitting.asked import Asked, Named
from lowrank_optim.fitting.costs import Costs, Way, gib
from lowrank_optim.fitting.paths import Path, largest, steps_to, uniform
from lowrank_optim.memory import GIB, Estimate
from lowrank_optim.ops.devices import HOST_MEMORY

ENOUGH, MOST = Fraction(1, 4), Fraction(1, 2)
"""Shares of the smaller sides: from which on nothing is given up for rank, and where it ends."""


def ways(named: Sequence[Named], asked: Asked) -> list[Way]:
    """Every way, in the order of what it gives up."""
    gentle = [mode for mode in asked.modes if mode != "step"]
    return [
        Way(optimizer, own, mode, store, own.get("state_device", place))
        for n, place in enumerate(asked.places)
        for optimizer, own in named
        if n == 0 or "state_device" not in own
        for modes in (gentle, [mode for mode in asked.modes if mode == "step"])
        for store in asked.state_dtypes
        for mode in modes
    ]


class Search:
    """The order of ways, and what each has room for."""

    def __init__(self, costs: Costs, asked: Asked, ways: Sequence[Way]) -> None:
        self.costs, self.asked, self.ways = costs, asked, ways
        self.sides = [m.side for m in costs.matrices]
        self.even = uniform(self.sides, asked.multiple, asked.least, MOST)
        self.enough = steps_to(self.sides, self.even, ENOUGH)
        """Steps of the uniform path to a quarter."""
        self.refused: dict[str, str] = {}

    def fits(self, way: Way, path: Path, count: int) -> bool:
        """Whether ranks after ``count`` steps are within the budget."""
        return self.costs.fits(way, path.ranks(count), self.asked.budget)

    def refuses(self, way: Way) -> str | None:
        """Why a method has no such mode; None if it has."""
        return self.costs.refuses(way, self.even.ranks(self.enough))

    def _possible(self) -> Iterator[Way]:
        """Ways that their methods have."""
        for way in self.ways:
            refusal = self.refuses(way)
            if refusal is None:
                yield way
            else:
                self.refused[str(way)] = refusal

    def way(self) -> Way:
        """The first with room for enough, or the one with room for most.

        Raises:
            ValueError: there is none.
        """
        possible = []
        for way in self._possible():
            if self.fits(way, self.even, self.enough):
                return way
            possible.append(way)
        if not possible:
            raise ValueError(f"no way to train is possible: {next(iter(self.refused.values()))}")
        best, most = None, -1
        for way in possible:
            if self.fits(way, self.even, most + 1):
                most, best = self._most(way, self.even, self.enough)[0], way
        if best is None:
            self._nothing_fits(possible)
        return best

    def _nothing_fits(self, possible: Sequence[Way]) -> NoReturn:
        """Say what budget would do.

        Raises:
            ValueError: always.
        """
        peak, least = self.costs.least(self._within_host(possible))
        raise ValueError(
            f"nothing fits {self.asked.budget.device / GIB:.6g} GiB: the least is {gib(peak)} GiB, "
            f"by {least} at rank {self.asked.least}. {self._advice(possible)}"
        )

    def _within_host(self, possible: Sequence[Way]) -> list[Way]:
        """Those whose moments are within what the host has, at the least ranks.

        Raises:
            ValueError: there is none.
        """
        limit, first = self.asked.budget.host, self.even.ranks(0)
        sizes = [self.costs.host(way, first) for way in possible]
        found = [way for way, size in zip(possible, sizes, strict=True) if size <= limit]
        if not found:
            raise ValueError(
                f"host_gib={limit / GIB:.6g} has no room for moments: the least is "
                f"{gib(min(sizes))} GiB at rank {self.asked.least}. Give that, or let moments lie "
                "on the device"
            )
        return found

    def _advice(self, possible: Sequence[Way]) -> str:
        """What would lower the least."""
        found = []
        sizes = [self.costs.host(way, self.even.ranks(0)) for way in possible]
        if max(sizes) > self.asked.budget.host:
            found.append(f"a host_gib of {gib(max(sizes))}, for moments in host memory")
        elif "cpu" not in self.asked.places and self.asked.device not in HOST_MEMORY:
            found.append("state_devices=[None, 'cpu'], for moments in host memory")
        if self.costs.tokens is not None:
            found.append("give fewer tokens, or checkpointing=True")
        if self.asked.accumulation_steps > 1:
            found.append("take one micro-batch, for which in_backward='step' frees all gradients")
        if self.asked.least > 1:
            found.append("a smaller least")
        return f"Give that budget; or {', or '.join(found) or 'train fewer parameters'}"

    def fill(self, way: Way, path: Path) -> tuple[list[int], Estimate]:
        """The largest ranks on ``path`` within the budget, and their own estimate."""
        count, found = self._most(way, path, len(path.steps))
        return path.ranks(count), found

    def _most(self, way: Way, path: Path, most: int) -> tuple[int, Estimate]:
        """How many steps of ``path`` fit, of at most so many, and the estimate of those ranks.

        What activations add at the least ranks is a bound. What they add at the ranks that fit by
        it leaves more room, and bounds what they add at those found in it. Where a bound does not
        hold, as larger ranks need more in passing, they are searched by their own estimates.
        """
        budget, host = self.asked.budget
        if host < math.inf:
            most = largest(lambda n: self.costs.host(way, path.ranks(n)), host, most)
        count = largest(self._peaks(way, path), budget, most)
        found = self._exact(way, path, count)
        if self.costs.tokens is not None and count < most and found.fits(budget):
            added = self.costs.added(way, path.ranks(count), found)
            more = largest(self._peaks(way, path, added), budget, most)
            again = self._exact(way, path, more) if more > count else found
            if again.fits(budget):
                count, found = max(more, count), again
        if not found.fits(budget):
            count = largest(lambda n: self._exact(way, path, n).peak, budget, count)
            found = self._exact(way, path, count)
        return count, found

    def _peaks(self, way: Way, path: Path, added: int | None = None) -> Callable[[int], int]:
        return lambda n: self.costs.peak(way, path.ranks(n), added)

    def _exact(self, way: Way, path: Path, count: int) -> Estimate:
        return self.costs.exact(way, path.ranks(count))
