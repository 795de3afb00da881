"""Ranks step by step: against brute force, a Lagrangian bound, and the shares themselves."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from lowrank_optim.fitting.paths import captured, greedy, largest, steps_to, uniform


def case(seed: int) -> tuple[list[list[float]], list[float], int]:
    """Spectra, bytes of a direction of each, and a multiple."""
    draw = random.Random(seed)
    sides = [draw.choice((4, 6, 8)) for _ in range(3)]
    energies = [sorted((draw.expovariate(1) ** 2 for _ in range(n)), reverse=True) for n in sides]
    return energies, [draw.choice((3.0, 5.0, 7.0)) for _ in sides], draw.choice((1, 2))


def spent(ranks, slopes, least) -> float:
    return sum(s * (r - least) for r, s in zip(ranks, slopes, strict=True))


def brute(energies, slopes, multiple, budget) -> float:
    """The most energy that any ranks capture."""
    choices = [range(multiple, len(own) + 1, multiple) for own in energies]
    return max(
        captured(energies, ranks)
        for ranks in itertools.product(*choices)
        if spent(ranks, slopes, multiple) <= budget
    )


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_optimal_where_it_spends_all(seed):
    """Every prefix captures as much as any ranks of its bytes."""
    energies, slopes, multiple = case(seed)
    path = greedy(energies, slopes, multiple, multiple, float("inf"))
    for count in range(len(path.steps) + 1):
        ranks = path.ranks(count)
        best = brute(energies, slopes, multiple, spent(ranks, slopes, multiple))
        assert captured(energies, ranks) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_behind_by_less_than_its_next_step(seed):
    """For any budget: the best of brute force, and the fractional bound above it."""
    energies, slopes, multiple = case(seed)
    every = greedy(energies, slopes, multiple, multiple, float("inf"))
    total = spent(every.ranks(len(every.steps)), slopes, multiple)
    for budget in (total * n / 17 for n in range(18)):
        path = greedy(energies, slopes, multiple, multiple, budget)
        count = len(path.steps)
        assert path.steps == every.steps[:count]
        ranks, after = path.ranks(count), every.ranks(count + 1)
        own, next_ = captured(energies, ranks), captured(energies, after)
        room = budget - spent(ranks, slopes, multiple)
        step = spent(after, slopes, multiple) - spent(ranks, slopes, multiple)
        bound = own + (next_ - own) * (room / step if step else 0.0)
        best = brute(energies, slopes, multiple, budget)
        assert own <= best * (1 + 1e-12)
        assert best <= bound * (1 + 1e-12)


def test_energy_per_byte_decides():
    """A matrix of half the bytes wins with more than half the energy; ranks end at the side."""
    path = greedy([[4.0, 3.0, 2.0], [6.0, 5.9, 1.0]], [1.0, 2.0], 1, 1, 100.0)
    assert path.steps == ((0,), (1,), (0,), (1,))
    assert path.ranks(4) == [3, 3]


def test_uniform_shares():
    """Every rank is the share of its side, rounded down; alike shares come at once."""
    path = uniform([64, 128, 24], 8, 8, Fraction(1, 2))
    ranks = [path.ranks(n) for n in range(len(path.steps) + 1)]
    assert ranks[0] == [8, 8, 8] and ranks[-1] == [32, 64, 8]
    for share in (Fraction(n, 64) for n in range(8, 33)):
        expected = [max(8, int(share * side) // 8 * 8) for side in (64, 128, 24)]
        assert path.ranks(steps_to([64, 128, 24], path, share)) == expected


@pytest.mark.parametrize(
    "shape", [lambda n: 3 * n, lambda n: n**3, lambda n: n // 50, lambda n: n**0.2]
)
def test_largest(shape):
    """Against a look at all; few are asked for where peaks are a line."""
    asked = []

    def peak(n):
        asked.append(n)
        return 10 + shape(n)

    for budget in (10, 11, 40, 13.5, 400, 10 + shape(300), 1e9):
        asked.clear()
        found = largest(peak, budget, 300)
        assert found == max(n for n in range(301) if 10 + shape(n) <= budget)
        assert len(asked) <= 20
        assert shape(300) != 900 or len(asked) <= 5
