"""The best learning rate of a method: inside of what was tried, or what was tried grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.study.recipes import METHODS, Case
from benchmarks.study.sizes import Size
from benchmarks.study.training import Trial

SEARCH_SEED = 100
"""Of no comparison."""
LADDER = (1.0, 3.0)
"""Rates are these, times powers of ten."""
GROWN = 3
"""How often a grid grows at most."""
Loss = Callable[[Trial], float]
Each = Callable[[Loss, Iterable[Trial]], Iterable[float]]
"""``map``, or one that makes runs beside each other."""


@dataclass(frozen=True)
class Found:
    """The losses of a search, and the best rate."""

    losses: dict[float, float]
    best: float
    inside: bool
    """False: no rate on one side of the best was tried, and the figure is of no searched method."""


def beside(lr: float, up: bool) -> float:
    """The next rate of the ladder."""
    exponent = math.floor(math.log10(lr) + 1e-9)
    place = LADDER.index(round(lr / 10.0**exponent, 6)) + (1 if up else -1)
    exponent, place = exponent + place // len(LADDER), place % len(LADDER)
    return float(f"{LADDER[place]:g}e{exponent}")


def search(
    size: Size, case: Case, loss: Loss, grid: Sequence[float] | None = None, each: Each = map
) -> Found:
    """The best of the method's grid, which grows by one rate while the best is at its end."""
    rates = sorted(METHODS[case.method].grid if grid is None else grid)
    losses: dict[float, float] = {}
    for _ in range(GROWN + 1):
        new = [lr for lr in rates if lr not in losses]
        found = each(loss, [Trial(size, case, lr, SEARCH_SEED) for lr in new])
        losses |= dict(zip(new, found, strict=True))
        best = min(rates, key=lambda lr: losses[lr])
        if best not in (rates[0], rates[-1]):
            return Found(losses, best, True)
        if best == rates[0]:
            rates = [beside(best, up=False), *rates]
        else:
            rates = [*rates, beside(best, up=True)]
    return Found(losses, best, False)
