r"""Ranks that grow step by step: all alike, or where a byte captures most energy.

A path begins at the least ranks, and each step adds to some of them. A budget allows a prefix of
it, so that a larger budget never gives any matrix a smaller rank.

Let :math:`E_i(r)` be the energy that the first r directions of matrix i capture, the sum of its r
largest squared singular values, and :math:`b_i` the bytes of one more direction. What is wanted is

.. math::
    \max_r \sum_i E_i(r_i) \quad \text{with} \quad \sum_i b_i r_i \le B

**The greedy order is optimal for every budget that it spends.** Singular values descend, so each
:math:`E_i` is concave and the energy per byte of its increments,
:math:`d_i(k) / b_i` with :math:`d_i(k) = E_i(k) - E_i(k - 1)`, does not increase with k. Take all
increments in descending order of energy per byte: the increments of one matrix come in their own
order, so that every prefix is a choice of ranks. Let a prefix spend B, and let :math:`\lambda` be
the energy per byte of its last increment. For any other ranks :math:`s` that spend at most B,

.. math::
    \sum_i E_i(s_i) \le \sum_i \bigl(E_i(s_i) - \lambda b_i s_i\bigr) + \lambda B
    \le \sum_i \bigl(E_i(r_i) - \lambda b_i r_i\bigr) + \lambda B = \sum_i E_i(r_i)

where the second step holds as the prefix has the increments whose energy is above
:math:`\lambda b_i` and none below it, and so maximises each term alone. Of a budget between two
prefixes the same line, with the fraction of the next increment that B pays for, bounds what any
ranks can capture: the greedy ranks are behind the best by less than that increment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Path:
    """Ranks of some matrices, from the least to the most."""

    first: tuple[int, ...]
    """The least ranks."""
    multiple: int
    """What a step adds to a rank."""
    steps: tuple[tuple[int, ...], ...]
    """Which matrices each step adds to."""

    def ranks(self, count: int) -> list[int]:
        """After ``count`` steps."""
        found = list(self.first)
        for step in self.steps[:count]:
            for i in step:
                found[i] += self.multiple
        return found


def uniform(sides: Sequence[int], multiple: int, least: int, most: Fraction) -> Path:
    """The same share of every smaller side, rounded down to a multiple, up to ``most`` of it.

    Args:
        sides: the smaller side of each matrix.
        multiple: of which ranks are.
        least: the first rank of all.
        most: a share.
    """
    found: dict[Fraction, list[int]] = {}
    for i, side in enumerate(sides):
        for rank in range(least + multiple, int(most * side) + 1, multiple):
            found.setdefault(Fraction(rank, side), []).append(i)
    steps = tuple(tuple(found[share]) for share in sorted(found))
    return Path((least,) * len(sides), multiple, steps)


def steps_to(sides: Sequence[int], path: Path, share: Fraction) -> int:
    """Steps of a uniform path whose ranks are at most ``share`` of the sides."""
    ranks, count = list(path.first), 0
    for step in path.steps:
        for i in step:
            ranks[i] += path.multiple
        if any(Fraction(ranks[i], sides[i]) > share for i in step):
            break
        count += 1
    return count


def greedy(
    energies: Sequence[Sequence[float]],
    slopes: Sequence[float],
    multiple: int,
    least: int,
    spend: float,
) -> Path:
    """Steps in descending order of energy per byte, as many as ``spend`` bytes pay for.

    Args:
        energies: squared singular values of each matrix, descending, as many as its smaller side.
        slopes: bytes of one more direction of each.
        multiple: of which ranks are.
        least: the first rank of all.
        spend: bytes beyond those of the least ranks.
    """
    order: list[tuple[float, int, int]] = []
    for i, (own, slope) in enumerate(zip(energies, slopes, strict=True)):
        worth = float("inf")  # rounding may lift a later increment over an earlier one
        for rank in range(least, len(own) - multiple + 1, multiple):
            worth = min(worth, sum(own[rank : rank + multiple]) / slope)
            order.append((-worth, i, rank))
    steps, left = [], spend
    for _, i, _ in sorted(order):
        left -= slopes[i] * multiple
        if left < 0:
            break
        steps.append((i,))
    return Path((least,) * len(energies), multiple, tuple(steps))


def captured(energies: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    """Energy that ``ranks`` capture."""
    return sum(sum(own[:rank]) for own, rank in zip(energies, ranks, strict=True))


def largest(peak: Callable[[int], float], budget: float, most: int) -> int:
    """The last of 0, ..., ``most`` whose peak is within a budget.

    Peaks rise, nearly as a line, so the line through two of them says where to look: a few are
    asked for, where halving would ask for many. It halves where the line does not shrink what is
    left.

    Args:
        peak: bytes at each; those of 0 are within the budget.
        budget: bytes.
        most: the last.
    """
    low, high = 0, most
    below, above = peak(low), peak(high)
    if above <= budget:
        return most
    width = 2 * (high - low)
    while high - low > 1:
        middle = (low + high) // 2
        if high - low <= width // 2 and above > below:
            guess = low + int((high - low) * (budget - below) / (above - below))
            middle = min(max(guess, low + 1), high - 1)
        width = high - low
        found = peak(middle)
        if found <= budget:
            low, below = middle, found
        else:
            high, above = middle, found
    return low
